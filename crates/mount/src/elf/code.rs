//! What x86-64 code calls and points to, without decoding it. Pure; nothing in the code is trusted.
//!
//! Code that may lie anywhere names all places by their distance from the instruction that follows: `call` and `jmp` (opcodes E8 and
//! E9 with a distance of 32 bits), and `lea` into a 64-bit register (REX.W, 8D, ModRM with mod 0 and r/m 5). These are looked
//! for at every byte. What looks like one and is none leads anywhere within 2 GiB, so that few
//! of them lead into the file: of 256 bytes it is less than one. Encodings: Intel SDM, volume 2, chapter 2 and the pages of these.

/// What an instruction names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// It goes on at this address.
    Called(u64),
    /// It makes a pointer to this address.
    Pointed(u64),
}

/// What code names that is mapped at `address`.
pub(crate) fn named(code: &[u8], address: u64) -> impl Iterator<Item = Named> + '_ {
    // where the instruction ends, and the distance from there
    let to = move |end: usize| {
        let distance = i32::from_le_bytes(code.get(end.checked_sub(4)?..end)?.try_into().ok()?);
        address.checked_add(end as u64)?.checked_add_signed(distance.into())
    };
    (0..code.len()).filter_map(move |at| match code[at..] {
        [0xe8 | 0xe9, ..] => to(at + 5).map(Named::Called),
        [0x48 | 0x4c, 0x8d, operands, ..] if operands & 0xc7 == 5 => to(at + 7).map(Named::Pointed),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn calls_jumps_and_pointers_are_found() {
        // as of: push rbx; lea rdi, [rip + 0x100]; lea r12, [rip - 0x20]; call .+0x10; mov rdi, r12; jmp .-0x30; lea rdi, [rsp + 8]
        let code = b"\x53\x48\x8d\x3d\x00\x01\x00\x00\x4c\x8d\x25\xe0\xff\xff\xff\xe8\x10\x00\x00\x00\
            \x4c\x89\xe7\xe9\xd0\xff\xff\xff\x48\x8d\x7c\x24\x08";
        let found: Vec<Named> = named(code, 0x1000).collect();
        let want =
            [Named::Pointed(0x1108), Named::Pointed(0xfef), Named::Called(0x1024), Named::Called(0xfec)];
        assert_eq!(found, want);
        assert_eq!(named(&code[..6], 0x1000).count(), 0, "one that is cut off names nothing");
    }

    proptest! {
        #[test]
        fn any_bytes_are_looked_through_without_a_panic(code in prop::collection::vec(any::<u8>(), 0..300), address in any::<u64>()) {
            prop_assert!(named(&code, address).count() <= code.len());
        }
    }
}
