//! How this process is of the mesh: its identity, and whoever keeps it. The edge and the sidecar begin here.
//!
//! Certificate and bundle come from the authority of the mesh, from PEM files, from a SPIFFE Workload API, or from the
//! authorities of Consul, Istio or Vault. All of them write into one [`MeshIdentity`], which handshakes read; what goes wrong takes nothing away and is told.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use certs::ca::channel::Pin;
use certs::clock::SystemClock;
use certs::consul_connect::{self, ConsulConnect};
use certs::identity::{SpiffeId, TrustDomain};
use certs::identity_files::IdentityFiles;
use certs::istio::{self, Istio};
use certs::mesh::{MeshIdentity, Own};
use certs::renewing::Renewing;
use certs::source::{Following, Source};
use certs::token::Token;
use certs::trust::Usage;
use certs::vault_pki::{self, AppRole, Auth, VaultPki};
use certs::workload::time::MeshTime;
use certs::workload::{self, Proof, Workload};
use certs::workload_api::client::WorkloadApi;
use config::membership::Ca;
use serde_json::{Value, json};

use super::mesh::Mesh;
use crate::telemetry::exposition::Exposition;
use crate::telemetry::names;
use crate::vars::hostname;

/// Who this process is to be, and who says so.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    pub trust_domain: &'a str,
    /// None where it is whoever its first certificate says.
    pub identity: Option<&'a str>,
    /// The name of its service.
    pub service: &'a str,
    pub ca: &'a Ca,
    /// How old connections to other sidecars get.
    pub connection_age: Duration,
}

/// A setting that cannot be used: its key, and what is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct SettingError {
    pub key: &'static str,
    pub problem: String,
}

fn wrong<E: std::fmt::Display>(key: &'static str) -> impl Fn(E) -> SettingError {
    move |problem| SettingError { key, problem: problem.to_string() }
}

/// The membership of this process. Clones are the same; the last one that is dropped ends it.
#[derive(Clone, Debug)]
pub struct Membership {
    mesh: Mesh,
    keeper: Keeper,
}

/// Who keeps the identity.
#[derive(Clone, Debug)]
enum Keeper {
    Authority(Workload),
    Source(Arc<Following>),
}

impl Membership {
    /// Begins to keep an identity, on the runtime of the caller.
    ///
    /// # Errors
    /// A setting cannot be used.
    pub fn start(settings: Settings<'_>) -> Result<Self, SettingError> {
        let domain: TrustDomain = settings.trust_domain.parse().map_err(wrong("trust_domain"))?;
        let id: Option<SpiffeId> =
            settings.identity.map(str::parse).transpose().map_err(wrong("identity"))?;
        let time = MeshTime::new(SystemClock::new());
        let own = Own { domain: domain.clone(), id: id.clone() };
        let identity = MeshIdentity::only(Some(own), time.clone());
        let keeper = match source(&settings, &domain, id.as_ref(), &time)? {
            Some(source) => Keeper::Source(Arc::new(Following::start(source, identity.clone()))),
            None => {
                let asked = authority(&settings, id)?;
                Keeper::Authority(Workload::start(asked, identity.clone(), time))
            }
        };
        let renewing = match &keeper {
            Keeper::Authority(workload) => Some(workload.clone()),
            // These look by themselves.
            Keeper::Source(_) => None,
        };
        let refused = move || renewing.iter().for_each(Workload::renew_now);
        Ok(Self { mesh: Mesh::new(identity, settings.connection_age, refused), keeper })
    }

    /// How other nodes of the mesh are reached.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Says where connections of the mesh are taken, where the authority visits who renews first in a rotation.
    pub fn announce(&self, address: SocketAddr) {
        if let Keeper::Authority(workload) = &self.keeper {
            workload.set_mesh_address(address);
        }
    }

    /// Tells the authority that this process ends, after everything else.
    pub async fn leave(&self) {
        if let Keeper::Authority(workload) = &self.keeper {
            workload.leave().await;
        }
    }

    /// The identity of this process.
    pub fn identity(&self) -> &MeshIdentity {
        self.mesh.identity()
    }

    /// What is wrong with it now. What is in force may be good all the same.
    pub fn problem(&self) -> Option<String> {
        match &self.keeper {
            Keeper::Source(source) => source.standing().borrow().problem.clone(),
            Keeper::Authority(workload) => {
                let status = workload.status();
                let status = status.borrow();
                let failure = || {
                    let (at, error) = status.last_error.as_ref()?;
                    status.last_success.is_none_or(|success| success < *at).then(|| error.clone())
                };
                status.refused.clone().or_else(failure)
            }
        }
    }

    /// Why there is no identity that is good now; none if there is one.
    pub fn missing(&self) -> Option<String> {
        let identity = self.identity();
        let problem = || self.problem().map(|problem| format!(": {problem}")).unwrap_or_default();
        if identity.trust().is_none() {
            return Some(format!("no trust bundle yet{}", problem()));
        }
        match identity.svid() {
            None => Some(format!("no certificate yet{}", problem())),
            Some(svid) if svid.left(identity.now()).is_zero() => {
                Some(format!("the certificate has expired{}", problem()))
            }
            Some(_) => None,
        }
    }

    /// For those who look on.
    pub fn told(&self) -> Value {
        let identity = self.identity();
        let svid = identity.svid().map(|svid| {
            json!({
                "id": svid.id().as_str(),
                "serial": svid.leaf().serial.to_string(),
                "not_before": seconds(svid.leaf().not_before),
                "not_after": seconds(svid.leaf().not_after),
                "issuer": svid.leaf().issuer.to_string(),
            })
        });
        let trust = identity.trust().map(|trust| {
            let own = trust.own().as_str().to_owned();
            let roots: Vec<_> = trust.roots(&own).map(|root| root.fingerprint.to_string()).collect();
            json!({"domain": own, "generation": trust.generation(), "roots": roots})
        });
        let mut told = json!({
            "svid": svid,
            "trust": trust,
            "problem": self.problem(),
            "oldest_connection_generation": *identity.oldest_connection().borrow(),
        });
        let kept = match &self.keeper {
            Keeper::Source(source) => {
                let standing = source.standing();
                let standing = standing.borrow();
                json!({"from": source.name(), "certificates": standing.certificates, "bundles": standing.bundles})
            }
            Keeper::Authority(workload) => {
                let status = workload.status();
                let status = status.borrow();
                json!({
                    "from": "the authority of the mesh",
                    "following": status.following,
                    "renewals": status.renewals,
                    "failures": status.failures,
                    "next_renewal": status.next_renewal.map(seconds),
                    "clock_offset_ms": status.clock_offset_ms,
                    "clock_jumps": status.clock_jumps,
                })
            }
        };
        if let (Value::Object(told), Value::Object(kept)) = (&mut told, kept) {
            told.extend(kept);
        }
        told
    }

    /// Writes what is worth a metric.
    pub fn expose(&self, out: &mut Exposition) {
        let metric = &names::MESH_PEERS_REFUSED_TOTAL;
        out.family("", metric);
        for (usage, reason, count) in self.identity().refused() {
            let side = if usage == Usage::Client { "inbound" } else { "outbound" };
            out.sample("", metric.name, [("side", side), ("reason", reason)], count);
        }
        let ends = self.identity().svid().map_or(0, |svid| seconds(svid.leaf().not_after));
        out.single("", &names::MESH_CERTIFICATE_ENDS, ends);
        let generation = self.identity().trust().map_or(0, |trust| trust.generation());
        out.single("", &names::MESH_TRUST_GENERATION, generation);
        if let Keeper::Authority(workload) = &self.keeper {
            let status = workload.status();
            let status = status.borrow();
            out.single("", &names::MESH_RENEWALS_TOTAL, status.renewals);
            out.single("", &names::MESH_RENEWAL_FAILURES_TOTAL, status.failures);
            out.single("", &names::MESH_TRUST_FOLLOWED, u64::from(status.following));
        }
    }

    /// Writes the handshakes towards other nodes below the family that is open.
    pub fn expose_handshakes(&self, out: &mut Exposition) {
        let (done, failed) = self.mesh.handshakes();
        for (outcome, count) in [("done", done)].into_iter().chain(failed) {
            let labels = [("side", "outbound"), ("outcome", outcome)];
            out.sample("", names::MESH_HANDSHAKES_TOTAL.name, labels, count);
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Where an identity comes from that the authority of the mesh does not give.
fn source(
    settings: &Settings<'_>,
    domain: &TrustDomain,
    id: Option<&SpiffeId>,
    time: &Arc<MeshTime>,
) -> Result<Option<Box<dyn Source>>, SettingError> {
    let ca = settings.ca;
    if let Some(files) = &ca.files {
        return Ok(Some(Box::new(IdentityFiles {
            domain: domain.clone(),
            certificate: files.cert.clone(),
            key: files.key.clone(),
            roots: files.trust.clone(),
            crl: files.crl.clone(),
        })));
    }
    if let Some(socket) = ca.workload_api.as_deref() {
        let api = WorkloadApi { socket: Some(socket.to_owned()), identity: id.cloned() };
        api.path().map_err(wrong("ca.workload_api"))?;
        return Ok(Some(Box::new(api)));
    }
    if let Some(agent) = ca.consul.as_deref() {
        let consul = ConsulConnect::new(consul_connect::Settings {
            address: agent.to_owned(),
            service: settings.service.to_owned(),
            token: ca.consul_token_file.clone().map(Token::File),
            ca_file: ca.consul_ca_file.clone(),
        });
        return Ok(Some(Box::new(consul.map_err(wrong("ca.consul"))?)));
    }
    if let Some(istio) = &ca.istio {
        let istio = Istio::new(istio::Settings {
            address: istio.address.to_string(),
            server_name: owned(istio.server_name.as_deref()),
            ca_file: istio.ca_file.clone(),
            pin: owned(istio.pin.as_deref()),
            token: Token::File(istio.token_file.clone()),
            ttl_seconds: istio.ttl.as_ref().map(|ttl| ttl.duration().as_secs()),
        });
        let istio = istio.map_err(wrong("ca.istio"))?;
        return Ok(Some(Box::new(Renewing::new(istio, id.cloned(), time.clone()))));
    }
    if let Some(settings) = &ca.vault {
        let vault = VaultPki::new(vault(settings)).map_err(wrong("ca.vault"))?;
        return Ok(Some(Box::new(Renewing::new(vault, id.cloned(), time.clone()))));
    }
    Ok(None)
}

fn owned(text: Option<&str>) -> Option<String> {
    text.map(str::to_owned)
}

fn vault(given: &config::membership::Vault) -> vault_pki::Settings {
    let auth = match (&given.token_file, &given.approle) {
        (None, Some(role)) => Auth::AppRole(AppRole {
            role_id: role.role_id.to_string(),
            secret_id: Token::File(role.secret_id_file.clone()),
            mount: owned(role.mount.as_deref()).unwrap_or_else(|| "approle".to_owned()),
        }),
        (file, _) => Auth::Token(Token::File(file.clone().unwrap_or_default())),
    };
    vault_pki::Settings {
        address: given.address.to_string(),
        mount: owned(given.mount.as_deref()).unwrap_or_else(|| "pki".to_owned()),
        role: given.role.to_string(),
        auth,
        namespace: owned(given.namespace.as_deref()),
        ca_file: given.ca_file.clone(),
        roots_file: given.roots_file.clone(),
        ttl_seconds: given.ttl.as_ref().map(|ttl| ttl.duration().as_secs()),
    }
}

/// How the authority of the mesh is asked.
fn authority(settings: &Settings<'_>, id: Option<SpiffeId>) -> Result<workload::Settings, SettingError> {
    let ca = settings.ca;
    let written = match &ca.pin_file {
        Some(path) => short(path).map_err(wrong("ca.pin_file"))?,
        None => String::new(),
    };
    let pins = written.split(',').chain(ca.pin.as_deref().unwrap_or_default().split(','));
    let pins: Result<Vec<Pin>, _> =
        pins.map(str::trim).filter(|pin| !pin.is_empty()).map(str::parse).collect();
    let pins = pins.map_err(wrong("ca.pin"))?;
    if pins.is_empty() {
        return Err(wrong("ca.pin_file")("there is no pin in it"));
    }
    let consul = ca.consul_token_file.clone();
    let consul = consul.map(|path| Proof::ConsulTokenFile(path, settings.service.to_owned()));
    let proxy_id = ca.proxy_id.as_deref().map(str::to_owned);
    Ok(workload::Settings {
        servers: ca.servers().map(str::to_owned).collect(),
        pins: pins.into(),
        proof: ca.token_file.clone().map(Proof::TokenFile).or(consul),
        identity: id,
        proxy_id: proxy_id.unwrap_or_else(|| format!("{}@{}", settings.service, hostname())),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ttl: ca.ttl.as_ref().map(|ttl| ttl.duration()),
    })
}

/// A file that holds a line or two.
fn short(path: &Path) -> Result<String, String> {
    let read = || {
        let mut text = String::new();
        std::fs::File::open(path)?.take(4096).read_to_string(&mut text)?;
        std::io::Result::Ok(text)
    };
    read().map_err(|error| format!("{} cannot be read: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use config::membership::CaFiles;

    use super::*;

    fn start(ca: Ca, identity: Option<&str>) -> Result<Membership, String> {
        Membership::start(Settings {
            trust_domain: "mesh.local",
            identity,
            service: "orders",
            ca: &ca,
            connection_age: Duration::from_secs(60),
        })
        .map_err(|error| error.to_string())
    }

    fn text<const MIN: usize, const MAX: usize>(text: &str) -> Option<config::fields::Text<MIN, MAX>> {
        config::fields::Text::new(text)
    }

    #[tokio::test]
    async fn settings_that_cannot_be_used_are_told_by_their_key() {
        let pin = "sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        let good = Ca { address: text("127.0.0.1:1"), pin: text(pin), ..Ca::default() };
        start(good.clone(), Some("spiffe://mesh.local/a")).unwrap();
        for (ca, identity, told) in [
            (Ca { pin: text("sha256/x"), ..good.clone() }, None, "ca.pin: a pin is"),
            (Ca { pin_file: Some("/nowhere".into()), ..good.clone() }, None, "ca.pin_file: /nowhere"),
            (good.clone(), Some("mesh.local/a"), "identity: "),
            (Ca { workload_api: text("agent.sock"), ..Ca::default() }, None, "ca.workload_api: `agent.sock`"),
            (Ca { consul: text("127.0.0.1"), ..Ca::default() }, None, "ca.consul: address"),
        ] {
            let error = start(ca, identity).unwrap_err();
            assert!(error.starts_with(told), "{told}: {error}");
        }
    }

    #[tokio::test]
    async fn what_is_missing_is_told_with_the_reason() {
        let files = CaFiles {
            cert: "/nowhere/cert".into(),
            key: "/nowhere/key".into(),
            trust: "/nowhere/roots".into(),
            crl: None,
        };
        let membership = start(Ca { files: Some(files), ..Ca::default() }, None).unwrap();
        let told = async {
            while !membership.missing().is_some_and(|why| why.contains("/nowhere/cert")) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), told).await.unwrap();
        assert!(membership.told()["from"].as_str().unwrap().contains("/nowhere/cert"));
    }
}
