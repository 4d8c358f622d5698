//! `wasm` of `config.yaml`: modules that become plugins.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::section::Section;

/// A WASM plugin. APISIX `wasm.plugins[]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WasmPlugin {
    /// The plugin's name.
    pub name: String,
    /// Its place in the order; the highest runs first.
    pub priority: i32,
    /// The module, in binary form.
    pub file: PathBuf,
    /// Where it sees a request. APISIX `http_request_phase`.
    pub phase: WasmPhase,
    /// What one callback may use up: about one for an instruction. Extension.
    pub fuel: u64,
    /// What an instance may take, in bytes. Extension.
    pub memory: usize,
}

/// Where a WASM plugin sees a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WasmPhase {
    /// Before the consumer is known.
    Rewrite,
    /// After it.
    Access,
}

/// Enough for tens of milliseconds.
const FUEL: u64 = 100_000_000;
const MEMORY: u64 = 64 << 20;

/// `directory` is where relative paths begin.
pub(super) fn read(wasm: Section<'_>, directory: &Path) -> Vec<WasmPlugin> {
    let mut plugins = Vec::new();
    for element in wasm.list("plugins").unwrap_or_default() {
        let Some(plugin) = wasm.element_section(&element, "an object with `name`, `priority` and `file`")
        else {
            continue;
        };
        let phases = [("access", WasmPhase::Access), ("rewrite", WasmPhase::Rewrite)];
        let phase = plugin.one_of("http_request_phase", &phases).unwrap_or(WasmPhase::Access);
        let priority = plugin.get("priority").and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok());
        let (name, file) = (plugin.word("name"), plugin.path("file"));
        let fuel = plugin.number("fuel", 1, u64::MAX).unwrap_or(FUEL);
        let memory = plugin.size("memory").unwrap_or(MEMORY);
        match (name, file, priority) {
            (Some(name), Some(file), Some(priority)) => plugins.push(WasmPlugin {
                name: name.to_owned(),
                priority,
                file: directory.join(file),
                phase,
                fuel,
                memory: usize::try_from(memory).unwrap_or(usize::MAX),
            }),
            _ => wasm.element_invalid(
                &element,
                "a WASM plugin needs `name`, a whole number as `priority`, and `file`",
            ),
        }
        plugin.finish();
    }
    wasm.finish();
    plugins
}
