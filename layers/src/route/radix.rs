//! A persistent radix tree from byte strings to values.
//!
//! Nodes are shared by `Arc` between versions: a clone is one reference count, and a change copies the nodes on
//! the way to its key, unless no other version holds them, when it changes them in place. Readers of an older
//! version never see a change and never wait. Dropping a version frees only what no other version shares.
//! Nothing recurses: the depth of a tree is up to whoever writes the configuration.

use std::sync::Arc;

use smallvec::SmallVec;

/// As long as fits beside the length without a second allocation.
type Fragment = SmallVec<[u8; 23]>;

/// A persistent map ordered by key. An empty map holds nothing on the heap.
pub(super) struct Radix<V> {
    root: Option<Arc<Node<V>>>,
}

#[derive(Clone)]
struct Node<V> {
    /// The part of the key between the parent and this node.
    fragment: Fragment,
    value: Option<V>,
    /// Ordered by first byte; no two share it.
    children: Box<[Child<V>]>,
}

struct Child<V> {
    /// First byte of the node's fragment, kept here so that a search touches one node per level.
    first: u8,
    node: Arc<Node<V>>,
}

impl<V> Clone for Radix<V> {
    fn clone(&self) -> Self {
        Radix { root: self.root.clone() }
    }
}

impl<V> Clone for Child<V> {
    fn clone(&self) -> Self {
        Child { first: self.first, node: Arc::clone(&self.node) }
    }
}

impl<V> Default for Radix<V> {
    fn default() -> Self {
        Radix { root: None }
    }
}

impl<V> Radix<V> {
    pub(super) fn is_empty(&self) -> bool {
        self.root.is_none()
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&V> {
        let mut node = self.root.as_deref()?;
        let mut rest = key.strip_prefix(node.fragment.as_slice())?;
        while let Some(first) = rest.first() {
            node = node.child(*first)?;
            rest = rest.strip_prefix(node.fragment.as_slice())?;
        }
        node.value.as_ref()
    }

    /// Calls `visit` with every value whose key is a prefix of `key`, shortest first, and the length of its key.
    pub(super) fn prefixes<'a>(&'a self, key: &[u8], mut visit: impl FnMut(usize, &'a V)) {
        let mut next = self.root.as_deref();
        let mut rest = key;
        while let Some(node) = next {
            let Some(behind) = rest.strip_prefix(node.fragment.as_slice()) else { return };
            rest = behind;
            if let Some(value) = &node.value {
                visit(key.len() - rest.len(), value);
            }
            next = rest.first().and_then(|first| node.child(*first));
        }
    }

    /// The values in order of their keys.
    pub(super) fn values(&self) -> Values<'_, V> {
        Values { root: self.root.as_deref(), open: SmallVec::new() }
    }
}

impl<V: Clone> Radix<V> {
    /// Gives `change` the place of `key`, to fill, alter or empty it. A place left empty disappears.
    pub(super) fn modify(&mut self, key: &[u8], change: impl FnOnce(&mut Option<V>)) {
        match &mut self.root {
            None => self.root = filled(change).map(|value| Arc::new(Node::leaf(key, value))),
            Some(root) => {
                update(root, key, change);
                if root.is_void() {
                    self.root = None;
                }
            }
        }
    }

    /// Sets the value of `key`; gives the one it had.
    pub(super) fn insert(&mut self, key: &[u8], value: V) -> Option<V> {
        let mut old = None;
        self.modify(key, |place| old = place.replace(value));
        old
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> Option<V> {
        // Looked up first, so that nothing is copied for a key that is not there.
        self.get(key)?;
        let mut old = None;
        self.modify(key, |place| old = place.take());
        old
    }
}

impl<V> Node<V> {
    fn leaf(fragment: &[u8], value: V) -> Self {
        Node { fragment: Fragment::from_slice(fragment), value: Some(value), children: Box::default() }
    }

    fn child(&self, first: u8) -> Option<&Node<V>> {
        // Few children are the rule, and a straight run over them beats jumping.
        let child = if self.children.len() <= 8 {
            self.children.iter().find(|child| child.first == first)?
        } else {
            let at = self.children.binary_search_by_key(&first, |child| child.first).ok()?;
            self.children.get(at)?
        };
        Some(&child.node)
    }

    fn is_leaf_of(&self, rest: &[u8]) -> bool {
        self.children.is_empty() && self.fragment.as_slice() == rest
    }

    fn is_void(&self) -> bool {
        self.value.is_none() && self.children.is_empty()
    }

    fn change_children(&mut self, change: impl FnOnce(&mut Vec<Child<V>>)) {
        let mut children = std::mem::take(&mut self.children).into_vec();
        change(&mut children);
        self.children = children.into_boxed_slice();
    }
}

impl<V: Clone> Node<V> {
    /// A node without value is there to branch; with one child left it becomes that child.
    fn absorb_only_child(&mut self) {
        if self.value.is_some() {
            return;
        }
        let [only] = &mut *self.children else { return };
        let child = Arc::make_mut(&mut only.node);
        self.fragment.extend_from_slice(&child.fragment);
        self.value = child.value.take();
        self.children = std::mem::take(&mut child.children);
    }
}

/// What `change` makes of an empty place.
fn filled<V>(change: impl FnOnce(&mut Option<V>)) -> Option<V> {
    let mut place = None;
    change(&mut place);
    place
}

/// Changes the tree below and with `root`.
fn update<V: Clone>(root: &mut Arc<Node<V>>, key: &[u8], change: impl FnOnce(&mut Option<V>)) {
    let mut edge = &mut *root;
    // What is left of the key, the fragment of `edge` included.
    let mut rest = key;
    loop {
        let shared = edge.fragment.iter().zip(rest).take_while(|(ours, theirs)| ours == theirs).count();
        rest = rest.get(shared..).unwrap_or_default();
        if shared < edge.fragment.len() {
            if let Some(value) = filled(change) {
                branch_off(Arc::make_mut(edge), shared, rest, value);
            }
            return;
        }

        let node = Arc::make_mut(edge);
        let Some(&first) = rest.first() else {
            change(&mut node.value);
            node.absorb_only_child();
            return;
        };
        match node.children.binary_search_by_key(&first, |child| child.first) {
            Err(at) => {
                let Some(value) = filled(change) else { return };
                let leaf = Child { first, node: Arc::new(Node::leaf(rest, value)) };
                node.change_children(|children| {
                    children.reserve_exact(1);
                    children.insert(at, leaf);
                });
                return;
            }
            Ok(at) => {
                if node.children.get(at).is_some_and(|child| child.node.is_leaf_of(rest)) {
                    // The one case in which a node may disappear. Its parent has a value or another child.
                    node.change_children(|children| {
                        let Some(child) = children.get_mut(at) else { return };
                        let leaf = Arc::make_mut(&mut child.node);
                        change(&mut leaf.value);
                        if leaf.value.is_none() {
                            children.remove(at);
                        }
                    });
                    node.absorb_only_child();
                    return;
                }
                let Some(child) = node.children.get_mut(at) else { return };
                edge = &mut child.node;
            }
        }
    }
}

/// Splits `node`, which shares only a part of its fragment with a new key, and adds that key, of which `rest`
/// is left behind the shared part.
fn branch_off<V>(node: &mut Node<V>, shared: usize, rest: &[u8], value: V) {
    let Some((above, below)) = node.fragment.split_at_checked(shared) else { return };
    let Some(&first_below) = below.first() else { return };
    let (above, below) = (Fragment::from_slice(above), Fragment::from_slice(below));
    let below =
        Node { fragment: below, value: node.value.take(), children: std::mem::take(&mut node.children) };
    let below = Child { first: first_below, node: Arc::new(below) };
    node.fragment = above;
    match rest.first() {
        None => {
            node.value = Some(value);
            node.children = Box::new([below]);
        }
        Some(&first) => {
            let beside = Child { first, node: Arc::new(Node::leaf(rest, value)) };
            node.children = Box::new(if first < first_below { [beside, below] } else { [below, beside] });
        }
    }
}

impl<V> Drop for Radix<V> {
    /// Frees what no other version shares, again in a loop.
    fn drop(&mut self) {
        let mut unshared = Vec::new();
        let mut next = self.root.take();
        while let Some(node) = next {
            if let Some(mut node) = Arc::into_inner(node) {
                unshared.extend(std::mem::take(&mut node.children).into_iter().map(|child| child.node));
            }
            next = unshared.pop();
        }
    }
}

/// Walks a tree in order of its keys.
pub(super) struct Values<'a, V> {
    root: Option<&'a Node<V>>,
    /// Siblings still to visit, one entry for each open level.
    open: SmallVec<[std::slice::Iter<'a, Child<V>>; 8]>,
}

impl<'a, V> Values<'a, V> {
    fn next_node(&mut self) -> Option<&'a Node<V>> {
        if let Some(root) = self.root.take() {
            return Some(root);
        }
        while let Some(siblings) = self.open.last_mut() {
            if let Some(child) = siblings.next() {
                return Some(&child.node);
            }
            self.open.pop();
        }
        None
    }
}

impl<'a, V> Iterator for Values<'a, V> {
    type Item = &'a V;

    fn next(&mut self) -> Option<&'a V> {
        loop {
            let node = self.next_node()?;
            if !node.children.is_empty() {
                self.open.push(node.children.iter());
            }
            if let Some(value) = &node.value {
                return Some(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn keys() -> impl Strategy<Value = Vec<u8>> {
        // A small alphabet makes keys share prefixes and be prefixes of each other.
        proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), Just(b'/'), Just(0xFF)], 0..12)
    }

    /// Every node either holds a value or branches, and children are found by their first byte.
    fn assert_compact(node: &Node<u32>, is_root: bool) {
        assert!(node.value.is_some() || node.children.len() > 1, "a node that does nothing");
        assert!(is_root || !node.fragment.is_empty());
        assert!(node.children.windows(2).all(|pair| pair[0].first < pair[1].first));
        for child in &node.children {
            assert_eq!(child.node.fragment.first(), Some(&child.first));
            assert_compact(&child.node, false);
        }
    }

    proptest! {
        #[test]
        fn behaves_as_an_ordered_map_and_old_versions_stay(
            steps in proptest::collection::vec((keys(), proptest::option::weighted(0.6, any::<u32>())), 1..60),
            probes in proptest::collection::vec(keys(), 1..20),
        ) {
            let mut tree = Radix::default();
            let mut model = BTreeMap::new();
            let mut versions = vec![(tree.clone(), model.clone())];
            for (key, value) in steps {
                match value {
                    Some(value) => prop_assert_eq!(tree.insert(&key, value), model.insert(key, value)),
                    None => prop_assert_eq!(tree.remove(&key), model.remove(&key)),
                }
                versions.push((tree.clone(), model.clone()));
            }
            for (tree, model) in versions {
                if let Some(root) = &tree.root {
                    assert_compact(root, true);
                }
                prop_assert_eq!(tree.is_empty(), model.is_empty());
                prop_assert!(tree.values().eq(model.values()));
                for probe in probes.iter().chain(model.keys()) {
                    prop_assert_eq!(tree.get(probe), model.get(probe));
                    let mut seen = Vec::new();
                    tree.prefixes(probe, |length, value| seen.push((length, *value)));
                    let expected: Vec<_> = (0..=probe.len())
                        .filter_map(|length| model.get(&probe[..length]).map(|value| (length, *value)))
                        .collect();
                    prop_assert_eq!(seen, expected);
                }
            }
        }
    }

    #[test]
    fn a_change_copies_only_the_way_to_its_key() {
        let mut tree = Radix::default();
        for number in 0..1000_u32 {
            tree.insert(format!("/service/{number:03}/x").as_bytes(), number);
        }
        let before = tree.clone();
        tree.insert(b"/service/500/y", 1);

        let shared = |tree: &Radix<u32>, key: &[u8]| std::ptr::from_ref(tree.get(key).unwrap());
        assert_eq!(shared(&before, b"/service/999/x"), shared(&tree, b"/service/999/x"));
        assert_eq!(before.get(b"/service/500/y"), None);
        assert_eq!(tree.get(b"/service/500/y"), Some(&1));
    }

    #[test]
    fn a_tree_of_any_depth_neither_overflows_a_stack_nor_loses_a_key() {
        let longest = vec![b'a'; 5_000];
        let mut tree = Radix::default();
        for length in 1..=longest.len() {
            tree.insert(&longest[..length], length);
        }
        let before = tree.clone();
        assert_eq!(tree.remove(&longest), Some(5_000));
        assert_eq!(before.get(&longest), Some(&5_000));
        drop(before);
        assert_eq!(tree.values().count(), 4_999);
    }
}
