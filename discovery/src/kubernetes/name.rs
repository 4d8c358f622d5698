//! `[id/]namespace/name[:port]`: how a service of a cluster is named in `service_name`.

use std::sync::Arc;

/// A service as it is named, without the id of its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub service: Key,
    /// The name or number of the port; none where the service has one only.
    pub port: Option<Arc<str>>,
}

/// The place of a service in its cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Name {
    /// Reads a name; the id is what stands in front of the namespace.
    pub(super) fn parse(text: &str) -> Result<(Option<&str>, Name), String> {
        let (path, port) = match text.rsplit_once(':') {
            Some((path, port)) => (path, Some(port)),
            None => (text, None),
        };
        let segments: Vec<&str> = path.split('/').collect();
        let (id, namespace, name) = match *segments.as_slice() {
            [namespace, name] => (None, namespace, name),
            [id, namespace, name] => (Some(id), namespace, name),
            _ => return Err(wrong(text)),
        };
        if [Some(namespace), Some(name), id, port].into_iter().flatten().any(|part| !is_part(part)) {
            return Err(wrong(text));
        }
        let service = Key { namespace: namespace.into(), name: name.into() };
        Ok((id, Name { service, port: port.map(Into::into) }))
    }
}

/// Names in Kubernetes are labels of DNS; what else is written never exists, and must not get into a path.
fn is_part(part: &str) -> bool {
    (1..=253).contains(&part.len())
        && part.starts_with(|first: char| first.is_ascii_alphanumeric())
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

fn wrong(text: &str) -> String {
    format!(
        "`{text}` does not name a service of Kubernetes: write `namespace/name:port`, or `id/namespace/name:port`"
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn names_are_read() {
        for (text, expected) in [
            ("default/web:http", Some((None, "default", "web", Some("http")))),
            ("default/web:8080", Some((None, "default", "web", Some("8080")))),
            ("default/web", Some((None, "default", "web", None))),
            ("east/default/web:http", Some((Some("east"), "default", "web", Some("http")))),
            ("web:http", None),
            ("default/:http", None),
            ("default/web:", None),
            ("a/b/c/d:e", None),
            ("default/../x:http", None),
            ("default/w b:http", None),
            ("", None),
        ] {
            let read = Name::parse(text).ok();
            let read = read
                .as_ref()
                .map(|(id, name)| (*id, &*name.service.namespace, &*name.service.name, name.port.as_deref()));
            assert_eq!(read, expected, "{text}");
        }
    }
}
