//! Where things are in an ELF file: what its headers, its sections and its dynamic symbols say. Pure; nothing in the file is trusted.
//!
//! 64 bits, little-endian (x86-64, aarch64, riscv64). The layouts are those of the System V gABI, chapter 4.

use std::ops::Range;

/// Bytes of a file's own header.
pub(crate) const ELF_HEAD_BYTES: usize = 64;
/// Bytes of the header of a section.
pub const ELF_SECTION_BYTES: usize = 64;
/// Bytes of a symbol.
pub(crate) const ELF_SYMBOL_BYTES: usize = 24;

/// The number at a place, if it lies within `bytes`.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

/// The number at a place, if it lies within `bytes`.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// The number at a place, if it lies within `bytes`.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Whether a file with these first bytes may be one.
pub fn is_elf(head: &[u8]) -> bool {
    // magic, 64 bits, little-endian
    head.starts_with(b"\x7fELF\x02\x01")
}

/// The name at the beginning of `bytes`, if it ends there.
pub fn elf_name(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    Some(&bytes[..end])
}

/// Where the headers of sections are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElfSections {
    /// In bytes of the file.
    pub headers: Range<u64>,
    /// The number of the section that has their names.
    pub names: usize,
}

impl ElfSections {
    /// By the first 64 bytes of a file. `None` where there are fewer, or what they say makes no sense.
    pub fn parse(head: &[u8]) -> Option<Self> {
        let start = u64_at(head, 40)?;
        let len = u64::from(u16_at(head, 60)?) * ELF_SECTION_BYTES as u64;
        Some(Self { headers: start..start.checked_add(len)?, names: u16_at(head, 62)?.into() })
    }
}

/// What the header of a section says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ElfSection {
    /// Where its name begins among the names.
    pub(crate) name: usize,
    pub(crate) kind: u32,
    /// At which address.
    pub(crate) address: u64,
    /// Where it is, in bytes of the file.
    pub(crate) range: Range<u64>,
    /// The number of another section that this one refers to.
    pub(crate) link: usize,
}

impl ElfSection {
    /// The kind of a section of which the file has no bytes, and that of the symbols that are known to the dynamic linker.
    const NO_BYTES: u32 = 8;
    pub(crate) const DYNAMIC_SYMBOLS: u32 = 11;

    pub(crate) fn parse(header: &[u8]) -> Option<Self> {
        let (kind, start, len) = (u32_at(header, 4)?, u64_at(header, 24)?, u64_at(header, 32)?);
        Some(Self {
            name: usize::try_from(u32_at(header, 0)?).ok()?,
            kind,
            address: u64_at(header, 16)?,
            range: start..if kind == Self::NO_BYTES { start } else { start.checked_add(len)? },
            link: usize::try_from(u32_at(header, 40)?).ok()?,
        })
    }

    /// Where in the file lies what has this address, where that is in this section.
    pub(crate) fn place(&self, address: u64) -> Option<u64> {
        let at = self.range.start.checked_add(address.checked_sub(self.address)?)?;
        self.range.contains(&at).then_some(at)
    }
}

/// Something that a file defines under a name: code or data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ElfSymbol {
    /// Where its name begins among the names.
    pub(crate) name: usize,
    /// The number of the section that it is in.
    pub(crate) section: usize,
    pub(crate) address: u64,
}

impl ElfSymbol {
    /// `None` where nothing is defined, or it is neither code nor data.
    pub(crate) fn parse(symbol: &[u8]) -> Option<Self> {
        const UNDEFINED: u16 = 0;
        const RESERVED: u16 = 0xff00;
        let (kind, section) = (symbol.get(4)? & 15, u16_at(symbol, 6)?);
        // an object, a function, one that is chosen when the file is loaded
        let is_place = matches!(kind, 1 | 2 | 10) && (UNDEFINED + 1..RESERVED).contains(&section);
        let name = usize::try_from(u32_at(symbol, 0)?).ok()?;
        is_place.then_some(Self { name, section: section.into(), address: u64_at(symbol, 8)? })
    }
}

#[cfg(test)]
mod tests {
    use lamina_testkit::library::libc;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_real_library_says_where_its_code_is() {
        let library = libc().unwrap();
        let part = |range: &Range<u64>| {
            &library[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
        };
        assert!(is_elf(&library));
        let table = ElfSections::parse(&library).unwrap();
        let sections: Vec<_> = part(&table.headers)
            .chunks_exact(ELF_SECTION_BYTES)
            .map(|one| ElfSection::parse(one).unwrap())
            .collect();
        let names = part(&sections[table.names].range);
        let text = sections.iter().position(|one| elf_name(&names[one.name..]) == Some(b".text")).unwrap();
        let symbols = sections.iter().find(|one| one.kind == ElfSection::DYNAMIC_SYMBOLS).unwrap();
        let names = part(&sections[symbols.link].range);
        let symbols = part(&symbols.range).chunks_exact(ELF_SYMBOL_BYTES).filter_map(ElfSymbol::parse);
        let named: Vec<_> = symbols.filter(|one| elf_name(&names[one.name..]) == Some(b"qsort")).collect();
        assert_eq!(named[0].section, text);
        assert!(sections[text].place(named[0].address).is_some());
        assert_eq!(sections[text].place(sections[text].address.wrapping_sub(1)), None);
    }

    #[test]
    fn what_has_no_bytes_in_the_file_has_no_place_there() {
        let mut header = [0; ELF_SECTION_BYTES];
        (header[4], header[32]) = (8, 100);
        let section = ElfSection::parse(&header).unwrap();
        assert_eq!((section.range.clone(), section.place(0)), (0..0, None));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), address in any::<u64>()) {
            let _ = (ElfSections::parse(&bytes), ElfSymbol::parse(&bytes), elf_name(&bytes), is_elf(&bytes));
            if let Some(section) = ElfSection::parse(&bytes) {
                prop_assert!(section.place(address).is_none_or(|at| section.range.contains(&at)));
            }
        }
    }
}
