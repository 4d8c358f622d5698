//! Maps of header fields that a worker's requests and answers use in turn, so that neither has to allocate its own and
//! a map that once grew for the fields which the gateway adds is large enough the next time. A map is emptied before it
//! comes here: nothing of a request or an answer may be found in another.

use std::cell::RefCell;

use http::HeaderMap;

/// A map with room for more is not kept.
const FIELDS: usize = 64;
/// Maps that a worker keeps.
const MAPS: usize = 128;

thread_local! {
    static SPARE: RefCell<Vec<HeaderMap>> = const { RefCell::new(Vec::new()) };
}

/// An empty map with room for so many fields at least.
pub(crate) fn fields(room: usize) -> HeaderMap {
    match SPARE.try_with(|spare| spare.borrow_mut().pop()) {
        Ok(Some(mut fields)) => {
            fields.reserve(room);
            fields
        }
        _ => HeaderMap::with_capacity(room),
    }
}

/// Takes a map that nobody needs any more.
pub(crate) fn give_back(mut fields: HeaderMap) {
    // The capacity does not count the second and further values of a name.
    if (1..=FIELDS).contains(&fields.capacity()) && fields.len() <= FIELDS {
        // Before the list is borrowed: values may belong to anybody.
        fields.clear();
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < MAPS {
                spare.push(fields);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use http::header;

    use super::*;

    #[test]
    fn a_map_is_used_again_empty_and_with_its_room() {
        let mut map = fields(20);
        map.append(header::HOST, HeaderValue::from_static("a"));
        map.append(header::HOST, HeaderValue::from_static("b"));
        let capacity = map.capacity();
        give_back(map);
        let again = fields(1);
        assert!(again.is_empty() && again.get(header::HOST).is_none());
        assert_eq!(again.capacity(), capacity);
    }

    #[test]
    fn large_maps_and_more_than_are_needed_are_let_go() {
        give_back(HeaderMap::with_capacity(FIELDS * 4));
        let mut many = fields(1);
        for _ in 0..=FIELDS {
            many.append(header::COOKIE, HeaderValue::from_static("a=b"));
        }
        give_back(many);
        assert!(SPARE.with_borrow(Vec::is_empty));
        (0..MAPS + 1).for_each(|_| give_back(HeaderMap::with_capacity(1)));
        assert_eq!(SPARE.with_borrow(Vec::len), MAPS);
        assert!(SPARE.with_borrow(|spare| spare.iter().all(|map| map.capacity() <= FIELDS)));
    }
}
