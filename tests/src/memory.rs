//! What a process has in its memory, read as a debugger would.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memchr::memmem::Finder;

const PAGE: u64 = 4096;
/// Pages that are read at once, and those that the next read begins with again, for what lies across.
const AT_ONCE: u64 = 4096;

/// Which of `needles` are somewhere in the memory that the process may write.
///
/// # Errors
/// It may not be looked at: that takes the rights of root.
pub fn holds(pid: u32, needles: &[Vec<u8>]) -> io::Result<Vec<bool>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let (memory, pages) =
        (File::open(format!("/proc/{pid}/mem"))?, File::open(format!("/proc/{pid}/pagemap"))?);
    let finders: Vec<Finder<'_>> = needles.iter().map(Finder::new).collect();
    let mut found = vec![false; needles.len()];
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        if !rights.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').expect("a range");
        let address = |text: &str| u64::from_str_radix(text, 16).expect("an address");
        let mut present = Present { pages: &pages, at: address(start) / PAGE, end: address(end) / PAGE };
        while let Some((first, count)) = present.next_run()? {
            let mut bytes = vec![0; usize::try_from(count * PAGE).expect("a length")];
            // What was given back to the system since is not there any more.
            if memory.read_exact_at(&mut bytes, first * PAGE).is_err() {
                continue;
            }
            for (found, finder) in found.iter_mut().zip(&finders) {
                *found |= finder.find(&bytes).is_some();
            }
        }
    }
    Ok(found)
}

/// The pages of a mapping that are in memory: most of an allocator's are not.
struct Present<'a> {
    pages: &'a File,
    at: u64,
    end: u64,
}

impl Present<'_> {
    fn next_run(&mut self) -> io::Result<Option<(u64, u64)>> {
        let (mut first, mut count) = (0, 0);
        while self.at < self.end && count < AT_ONCE {
            let mut entries =
                vec![0; usize::try_from((self.end - self.at).min(AT_ONCE)).expect("a length") * 8];
            self.pages.read_exact_at(&mut entries, self.at * 8)?;
            for entry in entries.chunks_exact(8) {
                // Present, or swapped out.
                let is_there = entry[7] & 0b1100_0000 != 0;
                match (is_there, count) {
                    (true, 0) => (first, count) = (self.at, 1),
                    (true, _) => count += 1,
                    (false, 0) => {}
                    (false, _) => return Ok(Some((first, count))),
                }
                self.at += 1;
                if count >= AT_ONCE {
                    // The last page once more, for what lies across.
                    self.at -= u64::from(self.at < self.end);
                    return Ok(Some((first, count)));
                }
            }
        }
        Ok((count > 0).then_some((first, count)))
    }
}
