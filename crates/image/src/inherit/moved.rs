//! Where the parts of a library are in its next version.
//!
//! A linker lays a library out anew with each build: a function that has grown moves everything behind it. What a start reads stays
//! the same by its meaning, which has names: sections, and in these the symbols.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use crate::elf::{
    ELF_HEAD_BYTES, ELF_SECTION_BYTES, ELF_SYMBOL_BYTES, ElfSection, ElfSections, ElfSymbol, elf_name, is_elf,
};
use crate::profile::PAGE_BYTES;

/// Sections and bytes of their names, at most.
const SECTIONS_MAX: u64 = 1024;
const SECTION_NAMES_BYTES_MAX: u64 = 64 << 10;
/// Bytes of symbols, and of their names, at most. The largest libraries of torch have 2 MiB and 7.
const SYMBOLS_BYTES_MAX: u64 = 48 << 20;
const NAMES_BYTES_MAX: u64 = 64 << 20;
/// Of one page come no more than so many: most of it is in one or two.
const PAGES_MAX: usize = 8;
/// A section of which all but one page in so many was read is read whole, whatever is in it.
const WHOLE_PART: u64 = 8;
/// Unless it has grown so many times.
const GROWTH_MAX: u64 = 2;

/// Where an ELF file has what.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// What is mapped, by name.
    sections: Vec<(Vec<u8>, Range<u64>)>,
    /// What the dynamic linker knows: where its name is in `names`, and where it is in the file.
    symbols: Vec<(usize, u64)>,
    names: Vec<u8>,
}

impl Layout {
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
        let Some(table) = table.filter(|table| fits(&table.headers, SECTIONS_MAX * ELF_SECTION_BYTES as u64))
        else {
            return Ok(None);
        };
        let headers = read(table.headers)?;
        let headers: Vec<_> = headers.chunks_exact(ELF_SECTION_BYTES).map_while(ElfSection::parse).collect();
        let names = headers.get(table.names).filter(|names| fits(&names.range, SECTION_NAMES_BYTES_MAX));
        let Some(names) = names else { return Ok(None) };
        let names = read(names.range.clone())?;
        let mut layout = Self::default();
        for section in headers.iter().filter(|section| section.is_mapped && fits(&section.range, u64::MAX)) {
            let name = names.get(section.name..).and_then(elf_name);
            if let Some(name) = name.filter(|_| !section.range.is_empty()) {
                layout.sections.push((name.to_vec(), section.range.clone()));
            }
        }
        let symbols = headers.iter().find(|section| section.kind == ElfSection::DYNAMIC_SYMBOLS);
        let symbols = symbols.filter(|symbols| fits(&symbols.range, SYMBOLS_BYTES_MAX));
        let named = symbols.and_then(|symbols| Some((symbols, headers.get(symbols.link)?)));
        if let Some((symbols, names)) = named.filter(|(_, names)| fits(&names.range, NAMES_BYTES_MAX)) {
            let symbols = read(symbols.range.clone())?;
            let symbols = symbols.chunks_exact(ELF_SYMBOL_BYTES).filter_map(ElfSymbol::parse);
            let place =
                |symbol: ElfSymbol| Some((symbol.name, headers.get(symbol.section)?.place(symbol.address)?));
            layout.symbols = symbols.filter_map(place).collect();
            layout.names = read(names.range.clone())?;
        }
        Ok(Some(layout))
    }

    fn section(&self, name: &[u8]) -> Option<&Range<u64>> {
        self.sections.iter().find(|(found, _)| found == name).map(|(_, range)| range)
    }

    fn symbols(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.symbols.iter().filter_map(|(name, at)| Some((elf_name(self.names.get(*name..)?)?, *at)))
    }
}

/// From here up to the next one, what is in the next version there; nothing where that is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Mark {
    was: u64,
    is: Option<u64>,
}

/// Where the parts of one version of a file are in the next one, in bytes of either.
#[derive(Debug)]
pub(super) struct Moved {
    /// By where they were.
    sections: Vec<(Range<u64>, Range<u64>)>,
    /// By where they were, and one at most at each place.
    marks: Vec<Mark>,
}

impl Moved {
    /// Cost: a step for each symbol of either, and a sort of them.
    pub(super) fn between(old: &Layout, new: &Layout) -> Self {
        let mut sections = Vec::new();
        // what lies before the first section is the file's own header
        let mut marks = vec![(Mark { was: 0, is: Some(0) }, 1)];
        for (name, was) in &old.sections {
            let is = new.section(name);
            marks.push((Mark { was: was.start, is: is.map(|is| is.start) }, 1));
            marks.push((Mark { was: was.end, is: None }, 3));
            sections.extend(is.map(|is| (was.clone(), is.clone())));
        }
        let known: HashMap<&[u8], u64> = new.symbols().collect();
        for (name, was) in old.symbols() {
            let is = known.get(name).copied();
            marks.push((Mark { was, is }, if is.is_some() { 0 } else { 2 }));
        }
        // of several at one place that which says most
        marks.sort_unstable_by_key(|(mark, rank)| (mark.was, *rank, mark.is));
        marks.dedup_by_key(|(mark, _)| mark.was);
        sections.sort_unstable_by_key(|(was, _)| was.start);
        Self { sections, marks: marks.into_iter().map(|(mark, _)| mark).collect() }
    }

    /// What follows from these pages having been read.
    pub(super) fn following<'a>(&'a self, read: &'a BTreeSet<u64>) -> Following<'a> {
        let is_whole = |(was, is): &&(Range<u64>, Range<u64>)| {
            let (was, is) = (pages(was), pages(is));
            let len = was.end - was.start;
            let missing = len - read.range(was).count() as u64;
            missing <= len / WHOLE_PART && is.end - is.start <= len.saturating_mul(GROWTH_MAX)
        };
        let whole = self.sections.iter().filter(is_whole).collect();
        Following { moved: self, read, whole }
    }

    /// Where these bytes are in the next version, piece by piece.
    fn pieces(&self, was: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.marks.partition_point(|mark| mark.was <= was.start).saturating_sub(1);
        let marks = self.marks[first..].iter().take_while(move |mark| mark.was < was.end);
        let ends = self.marks[first + 1..].iter().map(|mark| mark.was).chain([u64::MAX]);
        marks.zip(ends).filter_map(move |(mark, end)| {
            let (start, end) = (mark.was.max(was.start), end.min(was.end));
            let is = mark.is?.checked_add(start - mark.was)?;
            Some(is..is.checked_add(end - start)?)
        })
    }
}

/// Which pages of the next version a start reads that has read these.
#[derive(Debug)]
pub(super) struct Following<'a> {
    moved: &'a Moved,
    read: &'a BTreeSet<u64>,
    whole: Vec<&'a (Range<u64>, Range<u64>)>,
}

impl Following<'_> {
    /// The pages that come of one of those that were read, in order. Of each page of a whole section some come, and all of it of all.
    pub(super) fn pages(&self, page: u64) -> BTreeSet<u64> {
        let bytes = page.saturating_mul(PAGE_BYTES)..page.saturating_add(1).saturating_mul(PAGE_BYTES);
        let (mut found, mut rest) = (BTreeSet::new(), vec![bytes]);
        for (was, is) in self.whole.iter().copied().filter(|(was, _)| pages(was).contains(&page)) {
            found.extend(self.scaled(page, &pages(was), &pages(is)));
            rest = rest.into_iter().flat_map(|bytes| without(bytes, was)).collect();
        }
        let mut few = BTreeSet::new();
        for bytes in rest {
            self.add_moved(bytes, &mut few);
        }
        found.extend(few);
        found
    }

    /// The part of a whole section's pages that stands for one of them, and those behind it that were not read.
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

    /// By the marks; where these know nothing, by where in its section it was.
    fn add_moved(&self, bytes: Range<u64>, found: &mut BTreeSet<u64>) {
        let mut room = |range: Range<u64>| {
            for page in pages(&range) {
                if found.len() < PAGES_MAX {
                    found.insert(page);
                }
            }
        };
        let mut pieces = self.moved.pieces(bytes.clone()).peekable();
        if pieces.peek().is_some() {
            return pieces.for_each(room);
        }
        for (was, is) in &self.moved.sections {
            let (start, end) = (bytes.start.max(was.start), bytes.end.min(was.end));
            if start < end {
                let place = |at: u64| is.start.saturating_add(at - was.start).min(is.end);
                room(place(start)..place(end));
            }
        }
    }
}

/// The pages that these bytes lie in.
fn pages(bytes: &Range<u64>) -> Range<u64> {
    match bytes.is_empty() {
        true => 0..0,
        false => bytes.start / PAGE_BYTES..bytes.end.div_ceil(PAGE_BYTES),
    }
}

/// What is left of `bytes`, before and behind.
fn without(bytes: Range<u64>, taken: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let before = bytes.start..bytes.end.min(taken.start);
    let behind = bytes.start.max(taken.end)..bytes.end;
    let overlaps = bytes.start < taken.end && taken.start < bytes.end;
    let parts = if overlaps { [before, behind] } else { [bytes.clone(), bytes.end..bytes.end] };
    parts.into_iter().filter(|part| !part.is_empty())
}
