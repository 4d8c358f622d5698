//! Which plugins a request runs: those of the route, then of its plugin configuration, then of its service.
//!
//! A plugin that stands in several of them runs once, with the settings of the first (APISIX 2.4, step 4). What a
//! consumer adds is merged when the consumer is known (`layers::chain`).

use std::sync::Arc;

use layers::chain::{Instance, Plan};

/// One plan of several objects' plugins; those given first win.
pub fn merge<'a>(owners: impl IntoIterator<Item = &'a [Arc<Instance>]>) -> Plan {
    Plan::new(instances(owners))
}

/// The plugins of several objects, each name once; those given first win.
pub fn instances<'a>(owners: impl IntoIterator<Item = &'a [Arc<Instance>]>) -> Vec<Arc<Instance>> {
    let mut merged: Vec<Arc<Instance>> = Vec::new();
    for instance in owners.into_iter().flatten() {
        if merged.iter().all(|other| other.name != instance.name) {
            merged.push(instance.clone());
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use layers::chain::Source;
    use layers::plugin::Hooks;

    use super::*;

    fn plugin(name: &'static str, source: &str, priority: i32) -> Arc<Instance> {
        Arc::new(Instance {
            name,
            priority,
            source: Source(source.into()),
            filter: None,
            error_response: None,
            hooks: Hooks::default(),
        })
    }

    #[test]
    fn the_route_wins_over_its_plugin_config_and_that_over_the_service() {
        let route = [plugin("cors", "routes/1", 4000)];
        let config = [plugin("cors", "plugin_configs/1", 4000), plugin("echo", "plugin_configs/1", 412)];
        let service = [plugin("echo", "services/1", 412), plugin("key-auth", "services/1", 2500)];
        let plan = merge([&route[..], &config[..], &service[..]]);
        let told: Vec<_> = plan.instances().iter().map(|i| format!("{} of {}", i.name, i.source.0)).collect();
        assert_eq!(told, ["cors of routes/1", "key-auth of services/1", "echo of plugin_configs/1"]);
    }
}
