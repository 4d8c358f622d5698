//! Who has the key of the root, from the settings.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use certs::ca::foundry::Foundry;
use certs::ca::outside::cert_manager::{self, CertManager};
use certs::ca::outside::vault::{self, VaultRoot};
use certs::ca::outside::{Elsewhere, Outside};
use certs::token::Token;
use certs::vault::{Access, AppRole, Auth};
use config::ca::root;

/// The authority outside that is configured, if one is.
pub(super) fn open(root: Option<&root::Root>, foundry: &Arc<Foundry>) -> Result<Option<Elsewhere>> {
    let Some(root) = root else { return Ok(None) };
    let authority: Arc<dyn Outside> = if let Some(given) = &root.vault {
        let made = VaultRoot::new(in_vault(given));
        Arc::new(made.map_err(|problem| anyhow!("root.vault: {problem}"))?)
    } else if let Some(given) = &root.cert_manager {
        let made = CertManager::new(in_cluster(given));
        Arc::new(made.map_err(|problem| anyhow!("root.cert_manager: {problem}"))?)
    } else {
        return Ok(None);
    };
    Ok(Some(Elsewhere::new(Arc::clone(foundry), authority)))
}

fn owned(text: Option<&str>, other: &str) -> String {
    text.unwrap_or(other).to_owned()
}

fn in_vault(given: &root::Vault) -> vault::Settings {
    let auth = match (&given.approle, &given.token_env) {
        (Some(role), _) => Auth::AppRole(AppRole {
            role_id: role.role_id.to_string(),
            secret_id: Token::File(role.secret_id_file.clone()),
            mount: owned(role.mount.as_deref(), "approle"),
        }),
        (None, Some(name)) => Auth::Token(Token::Env(name.to_string())),
        (None, None) => Auth::Token(Token::File(given.token_file.clone().unwrap_or_default())),
    };
    vault::Settings {
        access: Access {
            address: given.address.to_string(),
            auth,
            namespace: given.namespace.as_deref().map(str::to_owned),
            ca_file: given.ca_file.clone(),
            deadline: Duration::from_secs(given.timeout.into()),
        },
        mount: owned(given.mount.as_deref(), "pki"),
        issuer: given.issuer.as_deref().map(str::to_owned),
        roots_file: given.roots_file.clone(),
    }
}

fn in_cluster(given: &root::CertManager) -> cert_manager::Settings {
    cert_manager::Settings {
        server: given.server.to_string(),
        ca_file: given.ca_file.clone(),
        token: Token::File(given.token_file.clone()),
        namespace: given.namespace.to_string(),
        name: given.issuer.name.to_string(),
        kind: given.issuer.kind.to_string(),
        group: given.issuer.group.to_string(),
        roots_file: given.roots_file.clone(),
        wait: Duration::from_secs(given.wait.into()),
    }
}
