//! Ways to damage sound bytes.

use proptest::prelude::*;

/// What to do to sound bytes. Positions are parts of 65,536 of the length.
#[derive(Clone, Debug)]
pub(crate) enum Damage {
    Set(u16, u8),
    Word(u16, u32),
    Repeat(u16, u16),
    Remove(u16, u16),
    CutOff(u16),
}

pub(crate) fn damages() -> impl Strategy<Value = Vec<Damage>> {
    let words = prop_oneof![any::<u32>(), 0u32..300, Just(u32::MAX), Just(1 << 31)];
    let damage = prop_oneof![
        8 => any::<(u16, u8)>().prop_map(|(at, byte)| Damage::Set(at, byte)),
        4 => (any::<u16>(), words).prop_map(|(at, word)| Damage::Word(at, word)),
        1 => (any::<u16>(), 1u16..600).prop_map(|(at, len)| Damage::Repeat(at, len)),
        1 => (any::<u16>(), 1u16..600).prop_map(|(at, len)| Damage::Remove(at, len)),
        1 => any::<u16>().prop_map(Damage::CutOff),
    ];
    prop::collection::vec(damage, 1..6)
}

/// Sound bytes after what was done to them.
pub(crate) fn damaged(sound: &[u8], damages: &[Damage]) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for damage in damages {
        let len = bytes.len();
        let at = |part: u16| len * usize::from(part) / 65_536;
        match *damage {
            Damage::Set(part, byte) if len > 0 => bytes[at(part)] = byte,
            Damage::Word(part, word) if len >= 4 => {
                let at = at(part).min(len - 4) / 4 * 4;
                bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            Damage::Repeat(part, more) => {
                let run = bytes[at(part)..(at(part) + usize::from(more)).min(len)].to_vec();
                bytes.splice(at(part)..at(part), run);
            }
            Damage::Remove(part, fewer) => {
                bytes.drain(at(part)..(at(part) + usize::from(fewer)).min(len));
            }
            Damage::CutOff(part) => bytes.truncate(at(part)),
            Damage::Set(..) | Damage::Word(..) => {}
        }
    }
    bytes
}
