//! `postern`: a gateway, and the commands that look after it.

mod client;
mod cmd;
mod logging;
mod observed;
mod output;
mod role;
mod runtime;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Threads come and go with requests' memory; the system allocator keeps what a burst took.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// An API gateway that runs an Apache APISIX configuration unchanged, in one binary.
#[derive(Parser)]
#[command(
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Try it:\n  postern up                        a gateway and a small mesh, with samples\n  \
                  postern edge -c /etc/apisix       the files that APISIX runs with\n  \
                  postern check /etc/apisix         find every error in them first\n  \
                  postern explain http://host/path  which route, which plugins, which node, and why\n\n\
                  Exit codes: 0 fine, 1 something was found wrong, 2 wrong usage, 3 the command could not do its work."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the edge gateway.
    Edge(role::edge::Edge),
    /// Run the edge gateway, an authority and sidecars with sample services, to try them.
    Up(role::up::Up),
    /// Stand beside an application in the mesh.
    Sidecar(Box<role::sidecar::Sidecar>),
    /// Run the certificate authority of a mesh, and make tokens by which workloads join.
    Ca(role::ca::Ca),
    /// Hold private keys of certificates and sign handshakes with them, so that gateways need not have them.
    Signer(role::signer::Signer),
    /// Watch registries for many gateways.
    Discovery(role::discovery::Discovery),
    /// Look at the certificates of a mesh, exchange them under traffic, and get out of trouble.
    Certs(cmd::certs::Certs),
    /// Find every error in a configuration directory, without starting anything.
    Check(cmd::check::Check),
    /// Tell what the gateway would do with a request, and why.
    Explain(cmd::explain::Explain),
    /// Take a node out of use, and know when nothing uses it any more.
    Drain(cmd::drain::Drain),
    /// Show the endpoints of upstreams: from whom, since when, used or not and why; or ask for them anew.
    Endpoints(cmd::endpoints::Endpoints),
    /// Show the certificates that an ACME authority gives, or order them anew.
    Acme(cmd::acme::Acme),
    /// Keep an application in its registry while it runs, and take it out before it is stopped.
    Register(role::register::Register),
    /// Tell how much of an APISIX configuration runs here as it runs there.
    Import(cmd::import::Import),
    /// Bring the pages about plugins and metrics up to date.
    #[command(hide = true)]
    Docs(cmd::docs::Docs),
}

/// Set by `postern up` for the processes that it starts.
const ENDS_WITH_PARENT: &str = "POSTERN_ENDS_WITH_PARENT";

fn main() -> ExitCode {
    if std::env::var_os(ENDS_WITH_PARENT).is_some() {
        // Where the kernel cannot do it, they end with the signal of the terminal.
        let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misread(&error),
    };
    let result = match cli.command {
        Command::Edge(role) => role.run(),
        Command::Up(role) => role.run(),
        Command::Ca(role) => role.run(),
        Command::Sidecar(role) => role.run(),
        Command::Signer(role) => role.run(),
        Command::Discovery(role) => role.run(),
        Command::Certs(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Explain(command) => command.run(),
        Command::Drain(command) => command.run(),
        Command::Endpoints(command) => command.run(),
        Command::Acme(command) => command.run(),
        Command::Register(role) => role.run(),
        Command::Import(command) => command.run(),
        Command::Docs(command) => command.run(),
    };
    result.unwrap_or_else(|error| output::failure(&error))
}

/// Prints help, or what is wrong with the arguments.
fn misread(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    // With `postern certs` 2 says that something ends soon, and a word that is misspelt must not.
    let is_certs = std::env::args_os().nth(1).is_some_and(|word| word == "certs");
    match error.exit_code() {
        0 => ExitCode::from(output::OK),
        _ if is_certs => ExitCode::from(output::FOUND),
        code => ExitCode::from(u8::try_from(code).unwrap_or(output::FAILED)),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
