//! `postern sidecar capture` as a command: what it prints, and what it says to somebody who may not.

use std::os::unix::fs::MetadataExt;

use e2e::edge::binary;

#[test]
fn without_privilege_the_rules_are_printed_and_nothing_else() {
    let is_root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    let run = |line: &str| {
        let binary = binary().display().to_string();
        let line = format!("{binary} sidecar capture {line}");
        let output = match is_root {
            // Root without this one capability; another user might not be let into the folder of the build.
            true => std::process::Command::new("bash")
                .args(["-c", &format!("exec setpriv --bounding-set=-net_admin --inh-caps=-all {line}")])
                .output(),
            false => std::process::Command::new("bash").args(["-c", &line]).output(),
        };
        let output = output.unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.code().unwrap(), said)
    };
    let (code, said) = run("print --skip-outbound-cidrs 10.0.0.0/8");
    assert!(code == 0 && said.contains("ip daddr 10.0.0.0/8 return"), "{said}");
    let (code, said) = run("print --iptables");
    assert!(code == 0 && said.contains("ip6tables-restore"), "{said}");
    for line in ["install", "check", "remove"] {
        let (code, said) = run(line);
        assert!(code == 3 && said.contains("CAP_NET_ADMIN"), "{line}: {code} {said}");
    }
    for (line, told) in [
        ("install --uid 0", "a uid of its own"),
        ("print --skip-inbound-ports '22; flush ruleset'", "no port"),
        ("print --skip-outbound-cidrs 10.0.0.0/33", "invalid"),
    ] {
        let (code, said) = run(line);
        assert!((code == 1 || code == 2) && said.contains(told), "{line}: {code} {said}");
    }
}
