//! What the dynamic linker touches of an ELF file, read from the file itself. Pure; nothing in the file is trusted.
//!
//! 64 bits, little-endian (x86-64, aarch64, riscv64). The layouts are those of the System V gABI, chapters 4 and 5; that a linker
//! writes to the target of every relocation when it loads a library, and looks up the symbol that it names, is in glibc's
//! `elf/dynamic-link.h`.

use std::collections::HashSet;
use std::ops::Range;

use lamina_image::{ElfSections, PAGE_BYTES, is_elf, u16_at, u32_at, u64_at};

mod code;
mod constructors;

/// Segments looked at.
const LOADS_MAX: usize = 16;
/// Libraries that one needs, at most.
const NEEDED_MAX: usize = 64;
/// Bytes of the longest name of a library that is looked at.
const NAME_BYTES_MAX: u64 = 128;
/// The longest dynamic section, and the longest table of relocations, that is looked at.
const DYNAMIC_BYTES_MAX: u64 = 64 << 10;
const RELOCATIONS_BYTES_MAX: u64 = 32 << 20;
/// The longest list of constructors that is looked at: 16,384 of them. The largest library of CUDA has 6,900.
const CONSTRUCTORS_BYTES_MAX: u64 = 128 << 10;
/// Of all names of one library: those of CUDA's and torch's take up to 15 MiB.
const NAMES_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a program header, of an entry of the dynamic section, of a relocation with addend, of a
/// symbol, of its version.
const HEADER_BYTES: usize = 56;
const ENTRY_BYTES: usize = 16;
pub(crate) const RELOCATION_BYTES: usize = 24;
const SYMBOL_BYTES: u64 = 24;
const VERSION_BYTES: u64 = 2;

/// A segment that is mapped.
#[derive(Debug)]
struct Load {
    address: u64,
    offset: u64,
    len: u64,
    is_code: bool,
    is_written: bool,
}

impl Load {
    fn place(&self, address: u64) -> Option<u64> {
        self.offset.checked_add(address.checked_sub(self.address)?)
    }
}

/// Whether `at` is one of the `len` from `start`.
fn lies_in(start: u64, len: u64, at: u64) -> bool {
    at.checked_sub(start).is_some_and(|from_start| from_start < len)
}

/// How a file is mapped.
#[derive(Debug)]
pub(crate) struct Elf {
    loads: Vec<Load>,
    /// Where its dynamic section is, in bytes of the file.
    pub(crate) dynamic: Range<u64>,
    /// Whether its code is looked at.
    pub(crate) is_x86_64: bool,
    pub(crate) sections: Option<ElfSections>,
}

/// What a dynamic section names, in bytes of the file.
#[derive(Debug, Default)]
pub(crate) struct Linked {
    /// Where the name of each library begins that is needed, and how far it may reach.
    pub(crate) needed: Vec<Range<u64>>,
    /// The tables of relocations.
    pub(crate) relocations: Vec<Range<u64>>,
    /// The addresses of its constructors, in the order in which they are called.
    pub(crate) constructors: Option<Range<u64>>,
    /// The names of its symbols.
    pub(crate) names: Option<Range<u64>>,
    symbols: Option<u64>,
    versions: Option<u64>,
}

/// What is mapped of a file with these first bytes, and its dynamic section, where it has one.
fn segments(head: &[u8]) -> Option<(Vec<Load>, Option<Range<u64>>)> {
    const PT_LOAD: u32 = 1;
    const PT_DYNAMIC: u32 = 2;
    const PF_X: u32 = 1;
    const PF_W: u32 = 2;
    if !is_elf(head) {
        return None;
    }
    let first = usize::try_from(u64_at(head, 32)?).ok()?;
    let (size, count) = (usize::from(u16_at(head, 54)?), usize::from(u16_at(head, 56)?));
    let (mut loads, mut dynamic) = (Vec::new(), None);
    for number in 0..count {
        let at = first.checked_add(number.checked_mul(size)?)?;
        let header = head.get(at..at.checked_add(HEADER_BYTES)?)?;
        let (offset, address, len) = (u64_at(header, 8)?, u64_at(header, 16)?, u64_at(header, 32)?);
        match u32_at(header, 0)? {
            PT_LOAD if loads.len() < LOADS_MAX => {
                let flags = u32_at(header, 4)?;
                let (is_code, is_written) = (flags & PF_X != 0, flags & PF_W != 0);
                loads.push(Load { address, offset, len, is_code, is_written });
            }
            PT_DYNAMIC => dynamic = Some(offset..offset.checked_add(len.min(DYNAMIC_BYTES_MAX))?),
            _ => {}
        }
    }
    Some((loads, dynamic))
}

/// Which bytes of a file with these first ones programs map to write to what they have of them; none where it is no program.
pub(crate) fn written(head: &[u8]) -> impl Iterator<Item = Range<u64>> {
    let loads = segments(head).map(|(loads, _)| loads).unwrap_or_default();
    let written = loads.into_iter().filter(|load| load.is_written);
    written.map(|load| load.offset..load.offset.saturating_add(load.len))
}

impl Elf {
    /// Reads the first bytes of a file. `None` where it is no such file, is not linked dynamically, or its program headers are not
    /// among them.
    pub(crate) fn parse(head: &[u8]) -> Option<Self> {
        const EM_X86_64: u16 = 62;
        let (loads, dynamic) = segments(head)?;
        Some(Self {
            loads,
            dynamic: dynamic?,
            is_x86_64: u16_at(head, 18)? == EM_X86_64,
            sections: ElfSections::parse(head),
        })
    }

    /// Where in the file lies what is mapped at `address`.
    fn place(&self, address: u64) -> Option<u64> {
        self.load(address)?.place(address)
    }

    /// The segment that is mapped at `address`.
    fn load(&self, address: u64) -> Option<&Load> {
        self.loads.iter().find(|load| lies_in(load.address, load.len, address))
    }

    /// Reads a dynamic section.
    pub(crate) fn linked(&self, dynamic: &[u8]) -> Linked {
        const DT_NEEDED: u64 = 1;
        const DT_PLTRELSZ: u64 = 2;
        const DT_STRTAB: u64 = 5;
        const DT_SYMTAB: u64 = 6;
        const DT_RELA: u64 = 7;
        const DT_RELASZ: u64 = 8;
        const DT_STRSZ: u64 = 10;
        const DT_JMPREL: u64 = 23;
        const DT_INIT_ARRAY: u64 = 25;
        const DT_INIT_ARRAYSZ: u64 = 27;
        const DT_VERSYM: u64 = 0x6fff_fff0;
        let entries = dynamic.chunks_exact(ENTRY_BYTES);
        let entries = entries.map_while(|entry| Some((u64_at(entry, 0)?, u64_at(entry, 8)?)));
        let entries: Vec<(u64, u64)> = entries.take_while(|(tag, _)| *tag != 0).collect();
        let value = |wanted| entries.iter().find(|(tag, _)| *tag == wanted).map(|(_, value)| *value);
        let address = |wanted| self.place(value(wanted)?);
        let table = |start, len, max| {
            let start: u64 = address(start)?;
            Some(start..start.checked_add(value(len)?.min(max))?)
        };
        let names = address(DT_STRTAB);
        let needed = entries.iter().filter(|(tag, _)| *tag == DT_NEEDED).take(NEEDED_MAX);
        let needed = needed.filter_map(|(_, name)| {
            let start = names?.checked_add(*name)?;
            Some(start..start.checked_add(NAME_BYTES_MAX)?)
        });
        Linked {
            needed: needed.collect(),
            relocations: [(DT_RELA, DT_RELASZ), (DT_JMPREL, DT_PLTRELSZ)]
                .into_iter()
                .filter_map(|(start, len)| table(start, len, RELOCATIONS_BYTES_MAX))
                .collect(),
            constructors: table(DT_INIT_ARRAY, DT_INIT_ARRAYSZ, CONSTRUCTORS_BYTES_MAX),
            names: table(DT_STRTAB, DT_STRSZ, NAMES_BYTES_MAX),
            symbols: address(DT_SYMTAB),
            versions: address(DT_VERSYM),
        }
    }

    /// The pages that making these relocations touches in a file of `size` bytes, each the first time it occurs, by where they
    /// begin. `seen` are those that were met before.
    pub(crate) fn touched(
        &self,
        linked: &Linked,
        relocations: &[u8],
        size: u64,
        seen: &mut HashSet<u64>,
    ) -> Vec<u64> {
        let mut pages = Vec::new();
        let mut touch = |at: Option<u64>| {
            let page = at.filter(|at| *at < size).map(|at| at / PAGE_BYTES * PAGE_BYTES);
            pages.extend(page.filter(|page| seen.insert(*page)));
        };
        for entry in relocations.chunks_exact(RELOCATION_BYTES) {
            let (Some(target), Some(symbol)) = (u64_at(entry, 0), u32_at(entry, 12)) else { break };
            touch(self.place(target));
            if symbol != 0 {
                let symbol = u64::from(symbol);
                touch(linked.symbols.and_then(|table| table.checked_add(symbol * SYMBOL_BYTES)));
                touch(linked.versions.and_then(|table| table.checked_add(symbol * VERSION_BYTES)));
            }
        }
        pages
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use lamina_image::elf_name;
    use proptest::prelude::*;

    use super::*;

    pub(super) fn header(kind: u32, offset: u64, address: u64, len: u64) -> Vec<u8> {
        let words = [offset, address, address, len, len, PAGE_BYTES];
        let mut header = [kind.to_le_bytes(), 6u32.to_le_bytes()].concat();
        header.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        header
    }

    /// A head with these program headers.
    pub(super) fn head(headers: &[Vec<u8>]) -> Vec<u8> {
        let mut head = vec![0; 64];
        head[..6].copy_from_slice(b"\x7fELF\x02\x01");
        head[32..40].copy_from_slice(&64u64.to_le_bytes());
        head[54..56].copy_from_slice(&56u16.to_le_bytes());
        head[56..58].copy_from_slice(&u16::try_from(headers.len()).unwrap().to_le_bytes());
        head.extend(headers.concat());
        head
    }

    /// The head of an x86-64 library that is `len` bytes of code.
    pub(crate) fn code_of(len: u64) -> Vec<u8> {
        let mut code = header(1, 0, 0, len);
        code[4] = 5;
        let mut head = head(&[code, header(2, 0, 0, 0)]);
        head[18] = 62;
        head
    }

    pub(super) fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn what_a_library_names_is_found_by_its_addresses() {
        let head = head(&[
            header(1, 0, 0, 0x5000),
            header(1, 0x5000, 0x1_5000, 0x3000),
            header(2, 0x7000, 0x1_7000, 0x200),
        ]);
        let elf = Elf::parse(&head).unwrap();
        assert_eq!(elf.dynamic, 0x7000..0x7200);
        let dynamic =
            words(&[1, 0x10, 5, 0x1000, 6, 0x2000, 0x6fff_fff0, 0x2800, 7, 0x3000, 8, 72, 0, 0, 1, 0x99]);
        let linked = elf.linked(&dynamic);
        let needed = 0x1010..0x1010 + NAME_BYTES_MAX;
        assert_eq!(linked.needed, std::slice::from_ref(&needed), "nothing after the end");
        assert_eq!(linked.relocations, std::slice::from_ref(&(0x3000..0x3000 + 72)));
        // relative; by symbol 200; into no segment
        let relocations = words(&[0x1_5008, 8, 0, 0x1_6010, 200 << 32 | 1, 0, 0x9_0000, 8, 0]);
        let mut seen = HashSet::new();
        let touched = elf.touched(&linked, &relocations, 0x8000, &mut seen);
        assert_eq!(touched, [0x5000, 0x6000, 0x3000, 0x2000]);
        assert!(elf.touched(&linked, &relocations, 0x8000, &mut seen).is_empty(), "each page once");
        let touched = elf.touched(&linked, &relocations, 0x4000, &mut HashSet::new());
        assert_eq!(touched, [0x3000, 0x2000], "none beyond the end");
    }

    #[test]
    fn what_is_no_such_file_names_nothing() {
        for bytes in [
            &b""[..],
            b"#!/bin/sh",
            b"\x7fELF\x01\x01",
            &head(&[header(1, 0, 0, 0x1000)]),
            &head(&[vec![1; 56]])[..80],
        ] {
            assert!(Elf::parse(bytes).is_none(), "{bytes:?}");
        }
        assert_eq!(elf_name(b"libc.so.6\0rest"), Some(&b"libc.so.6"[..]));
        assert_eq!(elf_name(b"libc.so.6"), None);
    }

    #[test]
    fn this_very_program_is_read_as_the_linker_reads_it() {
        let program = std::fs::read("/proc/self/exe").unwrap();
        let part = |range: &Range<u64>| {
            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            &program[range.start..range.end.min(program.len())]
        };
        let elf = Elf::parse(&program[..PAGE_BYTES as usize]).unwrap();
        let linked = elf.linked(part(&elf.dynamic));
        let needed: Vec<&[u8]> = linked.needed.iter().filter_map(|range| elf_name(part(range))).collect();
        assert!(needed.iter().any(|name| name.starts_with(b"libc.so")), "{needed:?}");
        let mut seen = HashSet::new();
        for table in &linked.relocations {
            elf.touched(&linked, part(table), program.len() as u64, &mut seen);
        }
        assert!(!seen.is_empty() && seen.iter().all(|page| *page < program.len() as u64));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(
            headers in prop::collection::vec((0u32..4, any::<u64>(), any::<u64>(), any::<u64>()), 0..20),
            dynamic in prop::collection::vec((0u64..30, any::<u64>()), 0..40),
            relocations in prop::collection::vec(any::<u8>(), 0..400),
            cut in any::<usize>(),
        ) {
            let headers: Vec<_> = headers.into_iter().map(|(kind, offset, address, len)| header(kind, offset, address, len)).collect();
            let head = head(&headers);
            if let Some(elf) = Elf::parse(&head[..cut % (head.len() + 1)]) {
                let dynamic: Vec<u64> = dynamic.into_iter().flat_map(|(tag, value)| [tag, value]).collect();
                let linked = elf.linked(&words(&dynamic));
                prop_assert!(linked.needed.len() <= NEEDED_MAX);
                prop_assert!(linked.relocations.iter().all(|table| table.end - table.start <= RELOCATIONS_BYTES_MAX));
                let touched = elf.touched(&linked, &relocations, u64::MAX, &mut HashSet::new());
                prop_assert!(touched.len() <= relocations.len() / RELOCATION_BYTES * 3);
            }
        }
    }
}
