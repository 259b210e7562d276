//! Where the parts of a library are in another build of it.
//!
//! A linker lays a library out anew with each build: a function that has grown moves everything behind it. What a start reads stays
//! the same by its meaning, which has names: sections, and in these the symbols.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use crate::elf::{
    ELF_HEAD_BYTES, ELF_SECTION_BYTES, ELF_SYMBOL_BYTES, ElfSection, ElfSections, ElfSymbol, elf_name, is_elf,
};
use crate::profile::PAGE_BYTES;

/// Sections at most, bytes of all their names, and of one of them.
const SECTIONS_MAX: u64 = 1024;
const SECTION_NAMES_BYTES_MAX: u64 = 64 << 10;
const SECTION_NAME_BYTES_MAX: usize = 255;
/// Bytes of symbols, of all their names, and of one of them, at most. The largest libraries of torch have 2 MiB and 7.
const SYMBOLS_BYTES_MAX: u64 = 48 << 20;
const NAMES_BYTES_MAX: u64 = 64 << 20;
const NAME_BYTES_MAX: usize = 16 << 10;
/// Names may have parts in common, so often that all of them together have so many times the bytes that they take.
const NAMES_SHARED_MAX: usize = 4;
/// Of a part of one page come no more than so many: most of it is in one or two.
const PAGES_MAX: usize = 8;
/// A section of which all but one page in so many was read is read whole, whatever is in it.
const WHOLE_PART: u64 = 8;
/// Unless it has grown so many times.
const GROWTH_MAX: u64 = 2;

/// What a library says of where it has what, in bytes of the file.
#[derive(Debug, Default)]
pub(super) struct Library {
    /// By name.
    sections: Vec<(Vec<u8>, Range<u64>)>,
    /// What the dynamic linker knows: where its name is in `names`, and where it is in the file.
    symbols: Vec<(Range<usize>, u64)>,
    names: Vec<u8>,
}

impl Library {
    /// Reads it of a file of `len` bytes, of which `read` gives a part. `None` where it is no such file, or has more of anything than a
    /// library could need.
    pub(super) fn read<E>(
        len: u64,
        mut read: impl FnMut(Range<u64>) -> Result<Vec<u8>, E>,
    ) -> Result<Option<Self>, E> {
        let fits = |range: &Range<u64>, max: u64| range.end <= len && range.end - range.start <= max;
        if len < ELF_HEAD_BYTES as u64 {
            return Ok(None);
        }
        let head = read(0..ELF_HEAD_BYTES as u64)?;
        let table = ElfSections::parse(&head).filter(|_| is_elf(&head));
        let table = table.filter(|table| fits(&table.headers, SECTIONS_MAX * ELF_SECTION_BYTES as u64));
        let Some(table) = table else { return Ok(None) };
        let headers = read(table.headers)?;
        let headers: Vec<_> = headers.chunks_exact(ELF_SECTION_BYTES).map_while(ElfSection::parse).collect();
        let names = headers.get(table.names).filter(|names| fits(&names.range, SECTION_NAMES_BYTES_MAX));
        let Some(names) = names else { return Ok(None) };
        let names = read(names.range.clone())?;
        let mut library = Self::default();
        for section in headers.iter().filter(|section| fits(&section.range, u64::MAX)) {
            let name = names.get(section.name..).and_then(|names| name(names, SECTION_NAME_BYTES_MAX));
            if let Some(name) = name.filter(|_| !section.range.is_empty()) {
                library.sections.push((name.to_vec(), section.range.clone()));
            }
        }
        let symbols = headers.iter().find(|section| section.kind == ElfSection::DYNAMIC_SYMBOLS);
        let Some(symbols) = symbols else { return Ok(Some(library)) };
        let names = headers.get(symbols.link).filter(|names| fits(&names.range, NAMES_BYTES_MAX));
        let names = names.filter(|_| fits(&symbols.range, SYMBOLS_BYTES_MAX));
        let Some(names) = names else { return Ok(None) };
        let symbols = read(symbols.range.clone())?;
        library.names = read(names.range.clone())?;
        Ok(library.takes(&headers, &symbols).then_some(library))
    }

    /// Takes the symbols; false where their names are too much.
    fn takes(&mut self, headers: &[ElfSection], symbols: &[u8]) -> bool {
        let mut bytes_left = self.names.len().saturating_mul(NAMES_SHARED_MAX);
        for symbol in symbols.chunks_exact(ELF_SYMBOL_BYTES).filter_map(ElfSymbol::parse) {
            let at = headers.get(symbol.section).and_then(|section| section.place(symbol.address));
            let named = self.names.get(symbol.name..).and_then(|names| name(names, NAME_BYTES_MAX));
            let (Some(at), Some(named)) = (at, named) else { continue };
            let Some(left) = bytes_left.checked_sub(named.len()) else { return false };
            bytes_left = left;
            self.symbols.push((symbol.name..symbol.name + named.len(), at));
        }
        true
    }

    /// Where each name is; nothing where it is in two places.
    fn places(&self) -> HashMap<&[u8], Option<u64>> {
        let mut places = HashMap::with_capacity(self.symbols.len());
        for (name, at) in &self.symbols {
            let place = places.entry(&self.names[name.clone()]).or_insert(Some(*at));
            *place = place.filter(|place| place == at);
        }
        places
    }
}

/// The name at the beginning of `bytes`, if it has at most `max`.
fn name(bytes: &[u8], max: usize) -> Option<&[u8]> {
    elf_name(&bytes[..bytes.len().min(max + 1)])
}

/// A section, and where it is in the other build, if it has one of that name.
#[derive(Debug)]
struct Section {
    was: Range<u64>,
    is: Option<Range<u64>>,
}

/// From here up to the next one, what is in the other build there, up to the end of its section; nothing where that is not known.
#[derive(Debug)]
struct Anchor {
    was: u64,
    is: Option<Range<u64>>,
}

/// Where the parts of a file are in another build of it, in bytes of either.
#[derive(Debug)]
pub(super) struct Rebuilt {
    /// By where they were. None has a byte of another one.
    sections: Vec<Section>,
    /// By where they were: the beginning of each section, and symbols.
    anchors: Vec<Anchor>,
}

impl Rebuilt {
    /// Cost: a step for each symbol of either, and a sort of them.
    pub(super) fn between(old: &Library, new: &Library) -> Self {
        let (before, now) = (apart(&old.sections), apart(&new.sections));
        let mut known = HashMap::new();
        for (name, is) in &now {
            known.entry(name).or_insert(is);
        }
        let section = |(name, was): &&(Vec<u8>, Range<u64>)| Section {
            was: was.clone(),
            is: known.get(name).map(|is| (*is).clone()),
        };
        let sections: Vec<_> = before.iter().map(section).collect();
        let up_to_end = |at: u64| {
            let section = now[..now.partition_point(|(_, is)| is.start <= at)].last();
            section.filter(|(_, is)| is.contains(&at)).map(|(_, is)| at..is.end)
        };
        let begin = |section: &Section| (Anchor { was: section.was.start, is: section.is.clone() }, 1);
        let mut anchors: Vec<_> = sections.iter().map(begin).collect();
        let known = new.places();
        for (name, was) in old.places() {
            match (was, known.get(name)) {
                (Some(was), Some(Some(is))) => anchors.push((Anchor { was, is: up_to_end(*is) }, 0)),
                (Some(was), None) => anchors.push((Anchor { was, is: None }, 2)),
                // nobody knows which of two
                _ => {}
            }
        }
        // of several at one place that which says most
        anchors.sort_by_key(|(anchor, rank)| (anchor.was, *rank, anchor.is.as_ref().map(|is| is.start)));
        anchors.dedup_by_key(|(anchor, _)| anchor.was);
        let mut anchors: Vec<_> = anchors.into_iter().map(|(anchor, _)| anchor).collect();
        anchors.shrink_to_fit();
        Self { sections, anchors }
    }

    /// How many parts it tells apart.
    pub(super) fn parts(&self) -> usize {
        self.sections.len() + self.anchors.len()
    }

    /// What follows from these pages having been read.
    pub(super) fn following<'a>(&'a self, read: &'a BTreeSet<u64>) -> Following<'a> {
        let is_whole = |section: &Section| {
            let Some(is) = &section.is else { return false };
            let was = pages(&section.was);
            let len = was.end - was.start;
            let missing = len - read.range(was).count() as u64;
            missing <= len / WHOLE_PART && pages(is).count() as u64 <= len.saturating_mul(GROWTH_MAX)
        };
        Following { rebuilt: self, read, is_whole: self.sections.iter().map(is_whole).collect() }
    }

    /// Where these bytes of one section are, piece by piece.
    fn pieces(&self, was: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.anchors.partition_point(|anchor| anchor.was <= was.start).saturating_sub(1);
        let anchors = self.anchors[first..].iter().take_while(move |anchor| anchor.was < was.end);
        let ends = self.anchors[first..].iter().skip(1).map(|anchor| anchor.was).chain([u64::MAX]);
        anchors.zip(ends).filter_map(move |(anchor, end)| {
            let (start, end) = (anchor.was.max(was.start), end.min(was.end));
            let is = anchor.is.as_ref()?;
            let place = |at: u64| Some(is.start.checked_add(at - anchor.was)?.min(is.end));
            Some(place(start)?..place(end)?)
        })
    }
}

/// Which pages of the other build a start reads that has read these.
#[derive(Debug)]
pub(super) struct Following<'a> {
    rebuilt: &'a Rebuilt,
    read: &'a BTreeSet<u64>,
    /// Of each section.
    is_whole: Vec<bool>,
}

impl Following<'_> {
    /// The pages that come in the place of one of those that were read. All pages of a section that is read whole have all of it
    /// together.
    pub(super) fn pages(&self, page: u64) -> BTreeSet<u64> {
        let (start, end) =
            (page.saturating_mul(PAGE_BYTES), page.saturating_add(1).saturating_mul(PAGE_BYTES));
        let sections = &self.rebuilt.sections;
        let first = sections.partition_point(|section| section.was.end <= start);
        let mut found = BTreeSet::new();
        let here = sections.iter().zip(&self.is_whole).skip(first);
        let mut here = here.take_while(|(section, _)| section.was.start < end).peekable();
        // the file's own header; and what no section has, as an archive that was appended
        if here.peek().is_none() || sections.first().is_some_and(|first| start < first.was.start) {
            found.insert(page);
        }
        for (section, is_whole) in here {
            match &section.is {
                Some(is) if *is_whole => found.extend(self.scaled(page, &pages(&section.was), &pages(is))),
                _ => found.extend(self.moved(start..end, section)),
            }
        }
        found
    }

    /// The part of a whole section's pages that stands for one of them, and for those behind it that were not read.
    fn scaled(&self, page: u64, was: &Range<u64>, is: &Range<u64>) -> Range<u64> {
        let is_first = self.read.range(was.start..page).next().is_none();
        let next = self.read.range(page + 1..was.end.max(page + 1)).next();
        let (from, to) = (if is_first { was.start } else { page }, next.map_or(was.end, |next| *next));
        let (len, new_len) = (u128::from(was.end - was.start), u128::from(is.end - is.start));
        let part = |at: u64| {
            let scaled = u128::from(at - was.start) * new_len / len;
            is.start + u64::try_from(scaled).expect("at most the pages of the new section")
        };
        part(from)..part(to)
    }

    /// By symbols; where these know nothing, by how far from the beginning of the section it was.
    fn moved(&self, bytes: Range<u64>, section: &Section) -> BTreeSet<u64> {
        let (was, is) = (&section.was, section.is.as_ref());
        let bytes = bytes.start.max(was.start)..bytes.end.min(was.end);
        let mut found = BTreeSet::new();
        let mut add = |piece: Range<u64>| {
            for page in pages(&piece) {
                if found.len() < PAGES_MAX {
                    found.insert(page);
                }
            }
        };
        let mut pieces = self.rebuilt.pieces(bytes.clone()).peekable();
        match (pieces.peek(), is) {
            (Some(_), _) => pieces.for_each(add),
            (None, Some(is)) => {
                let place = |at: u64| is.start.saturating_add(at - was.start).min(is.end);
                add(place(bytes.start)..place(bytes.end));
            }
            (None, None) => {}
        }
        found
    }
}

/// Sections by where they are, without those that have bytes of one before.
fn apart(sections: &[(Vec<u8>, Range<u64>)]) -> Vec<&(Vec<u8>, Range<u64>)> {
    let mut apart: Vec<_> = sections.iter().collect();
    apart.sort_by_key(|(_, range)| range.start);
    let mut end = 0;
    apart.retain(|(_, range)| {
        let is_apart = range.start >= end;
        end = if is_apart { range.end } else { end };
        is_apart
    });
    apart
}

/// The pages that these bytes lie in.
fn pages(bytes: &Range<u64>) -> Range<u64> {
    match bytes.is_empty() {
        true => 0..0,
        false => bytes.start / PAGE_BYTES..bytes.end.div_ceil(PAGE_BYTES),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn symbols(names: impl Iterator<Item = u32>) -> Vec<u8> {
        let symbol = |name: u32| [&name.to_le_bytes()[..], &[0x12, 0, 0, 0], &[0; 16]].concat();
        names
            .flat_map(symbol)
            .enumerate()
            .map(|(at, byte)| if at % ELF_SYMBOL_BYTES == 6 { 1 } else { byte })
            .collect()
    }

    /// Headers of no section, and of one of 1 MiB.
    fn headers() -> Vec<ElfSection> {
        let mut header = [0; ELF_SECTION_BYTES];
        let none = ElfSection::parse(&header).expect("it is long enough");
        header[34] = 0x10;
        vec![none, ElfSection::parse(&header).expect("it is long enough")]
    }

    #[test]
    fn names_that_have_most_of_their_bytes_in_common_are_no_librarys() {
        let names = [vec![b'a'; 10_000], vec![0]].concat();
        let of = |count: u32| {
            let mut library = Library { names: names.clone(), ..Library::default() };
            (library.takes(&headers(), &symbols(0..count)), library.symbols.len())
        };
        assert_eq!(of(3), (true, 3));
        assert_eq!(of(5), (false, 4));
    }

    #[test]
    fn a_name_without_an_end_is_none_and_costs_no_more_than_the_longest() {
        let mut library = Library { names: vec![b'a'; 1 << 20], ..Library::default() };
        assert!(library.takes(&headers(), &symbols(0..100)) && library.symbols.is_empty());
    }

    #[test]
    fn of_sections_that_lie_in_each_other_one_counts() {
        let named = |number: u8, range: Range<u64>| (vec![number], range);
        let old = Library {
            sections: (0..200).map(|number| named(number, 0..1 << 30)).collect(),
            ..Library::default()
        };
        let apart =
            |number: u8| named(number, u64::from(number) << 31..(u64::from(number) << 31) + (1 << 30));
        let new = Library { sections: (0..200).map(apart).collect(), ..Library::default() };
        let rebuilt = Rebuilt::between(&old, &new);
        let read = (0..1 << 18).filter(|page| !(1000..30_000).contains(page)).collect();
        let following = rebuilt.following(&read);
        assert_eq!(following.pages(999).len(), 29_001, "with those behind it that were not read");
        assert_eq!(read.iter().map(|page| following.pages(*page).len()).sum::<usize>(), 1 << 18);
    }

    #[test]
    fn a_name_in_two_places_says_nothing_of_either() {
        let library = |places: [u64; 2]| {
            let symbols = places.iter().map(|at| (0..1, *at)).collect();
            Library { sections: vec![(vec![1], 0..100_000)], symbols, names: b"f".to_vec() }
        };
        let rebuilt = Rebuilt::between(&library([0, 50_000]), &library([20_000, 90_000]));
        let read = [13].into();
        assert_eq!(rebuilt.following(&read).pages(13), [13].into());
    }

    fn library() -> impl Strategy<Value = Library> {
        let sections = prop::collection::vec((0u64..1 << 20, 1u64..1 << 18), 0..12);
        (sections, prop::collection::vec(0u64..1 << 20, 0..40)).prop_map(|(sections, symbols)| {
            let section =
                |(number, (start, len)): (usize, (u64, u64))| (vec![number as u8], start..start + len);
            let symbol = |(number, at): (usize, u64)| (number..number + 1, at);
            Library {
                sections: sections.into_iter().enumerate().map(section).collect(),
                symbols: symbols.into_iter().enumerate().map(symbol).collect(),
                names: (0..40).collect(),
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn in_the_same_build_each_page_is_where_it_was(
            library in library(), read in prop::collection::btree_set(0u64..400, 1..60),
        ) {
            let rebuilt = Rebuilt::between(&library, &library);
            let following = rebuilt.following(&read);
            for page in &read {
                prop_assert!(following.pages(*page).contains(page));
            }
        }

        #[test]
        fn in_any_other_build_few_pages_come_of_one(
            old in library(), new in library(), read in prop::collection::btree_set(0u64..400, 1..60),
        ) {
            let rebuilt = Rebuilt::between(&old, &new);
            let following = rebuilt.following(&read);
            let found: usize = read.iter().map(|page| following.pages(*page).len()).sum();
            prop_assert!(found <= read.len() * (PAGES_MAX + 1) + 12 * (PAGES_MAX + 64 * 2));
        }
    }
}
