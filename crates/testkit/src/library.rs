//! ELF libraries: described in code by sections, and symbols in them; and a real one.
//!
//! ```
//! use lamina_testkit::library::Library;
//!
//! let library = Library::new().section(".text", &[0xc3; 100]).symbol("f", ".text", 40).bytes();
//! assert!(library.starts_with(b"\x7fELF"));
//! ```
//!
//! Nothing in those that are described can be run. The layout is that of the System V gABI, chapter 4: 64 bits, little-endian.

use std::{fs, io};

/// The C library that this program runs with, whole.
///
/// *Errors*: it runs with none, or that cannot be read.
pub fn libc() -> io::Result<Vec<u8>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|line| line.contains("/libc.so"));
    let path = line.and_then(|line| line.split(' ').next_back());
    fs::read(path.ok_or(io::ErrorKind::NotFound)?)
}

/// What is mapped is this far behind where it lies in the file.
const ADDRESS: u64 = 0x10_0000;

/// A library.
#[derive(Clone, Debug, Default)]
pub struct Library {
    sections: Vec<(String, Vec<u8>)>,
    symbols: Vec<(String, String, u64)>,
}

impl Library {
    /// One without anything.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a section that is mapped.
    pub fn section(mut self, name: &str, bytes: &[u8]) -> Self {
        self.sections.push((name.to_owned(), bytes.to_vec()));
        self
    }

    /// Says that something begins so many bytes into a section, a function.
    pub fn symbol(mut self, name: &str, section: &str, offset: u64) -> Self {
        self.symbols.push((name.to_owned(), section.to_owned(), offset));
        self
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = vec![0; 64];
        let mut headers = vec![Header::default()];
        for (name, bytes) in &self.sections {
            headers.push(Header::of(name, 1, append(&mut file, bytes)));
        }
        let (symbols, names) = self.symbols(&headers);
        let mut symbols = Header::of(".dynsym", 11, append(&mut file, &symbols));
        symbols.link = number(headers.len() + 1);
        headers.extend([symbols, Header::of(".dynstr", 3, append(&mut file, &names))]);
        let mut names = vec![0];
        let mut table: Vec<u8> = headers.iter().flat_map(|header| header.bytes(&mut names)).collect();
        let names = Header { address: 0, flags: 0, ..Header::of("", 3, append(&mut file, &names)) };
        table.extend(names.bytes(&mut vec![0]));
        let (at, _) = append(&mut file, &table);
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[40..48].copy_from_slice(&at.to_le_bytes());
        let last = u16::try_from(headers.len()).expect("few");
        for (place, word) in [(58, 64), (60, last + 1), (62, last)] {
            file[place..place + 2].copy_from_slice(&word.to_le_bytes());
        }
        file
    }

    /// The table of symbols, and their names. The first of either is empty.
    fn symbols(&self, headers: &[Header<'_>]) -> (Vec<u8>, Vec<u8>) {
        let (mut symbols, mut names) = (vec![0; 24], vec![0]);
        for (name, section, offset) in &self.symbols {
            let section = headers.iter().position(|header| header.name == section);
            let section = section.expect("a symbol is in a section that is there");
            symbols.extend(number(names.len()).to_le_bytes());
            // global, a function; seen by all
            symbols.extend([0x12, 0]);
            symbols.extend(u16::try_from(section).expect("few").to_le_bytes());
            symbols.extend((headers[section].address + offset).to_le_bytes());
            symbols.extend(0u64.to_le_bytes());
            names.extend(name.bytes().chain([0]));
        }
        (symbols, names)
    }
}

/// The header of a section.
#[derive(Default)]
struct Header<'a> {
    name: &'a str,
    kind: u32,
    flags: u64,
    address: u64,
    at: u64,
    len: u64,
    link: u32,
}

impl<'a> Header<'a> {
    /// Of one that is mapped.
    fn of(name: &'a str, kind: u32, (at, len): (u64, u64)) -> Self {
        Self { name, kind, flags: 2, address: ADDRESS + at, at, len, link: 0 }
    }

    fn bytes(&self, names: &mut Vec<u8>) -> Vec<u8> {
        let name = if self.name.is_empty() { 0 } else { number(names.len()) };
        if name != 0 {
            names.extend(self.name.bytes().chain([0]));
        }
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let places = [self.flags, self.address, self.at, self.len].map(u64::to_le_bytes).concat();
        [words(&[name, self.kind]), places, words(&[self.link, 0, 1, 0, 0, 0])].concat()
    }
}

/// Where it lies now, and its length.
fn append(file: &mut Vec<u8>, bytes: &[u8]) -> (u64, u64) {
    let at = file.len() as u64;
    file.extend_from_slice(bytes);
    (at, bytes.len() as u64)
}

fn number(len: usize) -> u32 {
    u32::try_from(len).expect("small")
}
