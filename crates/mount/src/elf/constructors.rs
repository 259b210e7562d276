//! Where a library's constructors are, and what they name.

use std::ops::Range;

use lamina_image::{ELF_SECTION_BYTES, elf_name, u32_at, u64_at};

use super::code::{self, Named};
use super::{CONSTRUCTORS_BYTES_MAX, Elf, lies_in};

/// The longest names of sections.
const SECTION_NAMES_BYTES_MAX: u64 = 4096;

impl Elf {
    /// Where the names of sections are, by their headers.
    pub(crate) fn section_names(&self, sections: &[u8]) -> Option<Range<u64>> {
        let names = self.sections.as_ref()?.names;
        section(sections.chunks_exact(ELF_SECTION_BYTES).nth(names)?, SECTION_NAMES_BYTES_MAX)
    }

    /// Where the addresses of constructors are in a library that its dynamic section names none of: in `.ctors`, which
    /// code of the library itself goes through from the end to the beginning (GCC, `crtstuff.c`). So are libraries of CUDA linked.
    pub(crate) fn old_constructors(sections: &[u8], names: &[u8]) -> Option<Range<u64>> {
        let is_it = |header: &&[u8]| {
            let at = u32_at(header, 0).and_then(|at| usize::try_from(at).ok());
            at.and_then(|at| elf_name(names.get(at..)?)) == Some(b".ctors")
        };
        section(sections.chunks_exact(ELF_SECTION_BYTES).find(is_it)?, CONSTRUCTORS_BYTES_MAX)
    }

    /// Where in the file each of the constructors begins whose addresses these are.
    pub(crate) fn constructors(&self, addresses: &[u8]) -> Vec<u64> {
        let addresses = addresses.chunks_exact(size_of::<u64>()).filter_map(|address| u64_at(address, 0));
        // zero where the linker left it to the relocation, all ones at the beginning of .ctors
        addresses.filter_map(|address| self.code(address)).collect()
    }

    /// Where in the file lies what code calls and points to that begins at `at` in it.
    pub(crate) fn named(&self, code: &[u8], at: u64) -> Vec<u64> {
        let load = self.loads.iter().find(|load| lies_in(load.offset, load.len, at));
        let address = load.and_then(|load| load.address.checked_add(at - load.offset));
        let place = |named| match named {
            Named::Called(address) => self.code(address),
            Named::Pointed(address) => self.place(address),
        };
        address.map(|address| code::named(code, address).filter_map(place).collect()).unwrap_or_default()
    }

    /// Where in the file lies the code that is mapped at `address`.
    fn code(&self, address: u64) -> Option<u64> {
        self.load(address).filter(|load| load.is_code)?.place(address)
    }
}

/// Where a section is in the file: no more than its first `max` bytes.
fn section(header: &[u8], max: u64) -> Option<Range<u64>> {
    let (start, len) = (u64_at(header, 24)?, u64_at(header, 32)?);
    Some(start..start.checked_add(len.min(max))?)
}

#[cfg(test)]
mod tests {
    use lamina_testkit::library::libc;
    use proptest::prelude::*;

    use super::super::tests::{head, header, words};
    use super::*;

    /// Code at 0x1000 (flags 5), data at 0x10000; as it lies in the file.
    fn library(machine: u8) -> Elf {
        let mut code = header(1, 0x1000, 0x1000, 0x1000);
        code[4] = 5;
        let mut data = header(1, 0x2000, 0x1_0000, 0x1000);
        data[4] = 6;
        let mut head = head(&[code, data, header(2, 0x2100, 0x1_0100, 0x100)]);
        (head[18], head[40], head[60], head[62]) = (machine, 0x80, 3, 2);
        Elf::parse(&head).unwrap()
    }

    #[test]
    fn constructors_are_code_and_name_code_and_data() {
        let elf = library(62);
        let list = words(&[u64::MAX, 0x1010, 0, 0x1_0010, 0x1ff0]);
        assert_eq!(elf.constructors(&list), [0x1010, 0x1ff0], "neither padding nor what is no code");
        assert!(elf.is_x86_64 && !library(183).is_x86_64);
        // at 0x1010: call 0x1100; call 0x10000, which is no code; lea rdi, [0x10000]; lea rdi, [0x20000], where nothing is
        let code = b"\xe8\xeb\x00\x00\x00\xe8\xe6\xef\x00\x00\x48\x8d\x3d\xdf\xef\x00\x00\x48\x8d\x3d\xd8\xef\x01\x00";
        assert_eq!(elf.named(code, 0x1010), [0x1100, 0x2000]);
        assert!(elf.named(code, 0x9000).is_empty(), "not in the file");
    }

    #[test]
    fn old_constructors_are_found_by_the_name_of_their_section() {
        let elf = library(62);
        assert_eq!(elf.sections.as_ref().unwrap().headers, 0x80..0x80 + 3 * 64);
        let section = |name: u64, offset, len| words(&[name, 0, 0, offset, len, 0, 0, 0]);
        let sections = [section(1, 0x10, 0x20), section(7, 0x300, 0x40), section(0, 0x500, 14)].concat();
        assert_eq!(elf.section_names(&sections), Some(0x500..0x50e));
        let names = b"\0.text\0.ctors\0";
        assert_eq!(Elf::old_constructors(&sections, names), Some(0x300..0x340));
        assert_eq!(Elf::old_constructors(&sections[..64], names), None);
        assert_eq!(Elf::old_constructors(&sections, b"\0.text\0.dtors\0"), None);
    }

    #[test]
    fn the_sections_of_a_real_library_are_found() {
        let library = libc().unwrap();
        let part = |range: &Range<u64>| {
            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            &library[range.start..range.end.min(library.len())]
        };
        let elf = Elf::parse(&library[..4096]).unwrap();
        assert!(elf.linked(part(&elf.dynamic)).constructors.is_some());
        let sections = part(&elf.sections.as_ref().unwrap().headers);
        let names = part(&elf.section_names(sections).unwrap());
        assert!(names.windows(7).any(|name| name == b"\0.text\0"), "{names:?}");
        assert_eq!(Elf::old_constructors(sections, names), None, "nothing has had it since 2012");
    }

    proptest! {
        #[test]
        fn any_sections_and_code_are_read_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
            names in prop::collection::vec(any::<u8>(), 0..40),
            at in any::<u64>(),
        ) {
            let elf = library(62);
            let ranges = [elf.section_names(&bytes), Elf::old_constructors(&bytes, &names)];
            prop_assert!(ranges.into_iter().flatten().all(|range| range.end - range.start <= CONSTRUCTORS_BYTES_MAX));
            prop_assert!(elf.constructors(&bytes).len() <= bytes.len() / 8);
            prop_assert!(elf.named(&bytes, at % 0x4000).len() <= bytes.len());
        }
    }
}
