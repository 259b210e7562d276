//! Wrong passwords: who tries many has to wait.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Wrong passwords from one address that cost nothing: people mistype, and several may sit behind one address.
const FREE: u32 = 10;
/// After that it waits this long, and twice as long after each further one,
const WAIT_MIN: Duration = Duration::from_secs(2);
/// up to this: about a hundred guesses a day.
const WAIT_MAX: Duration = Duration::from_secs(15 * 60);
/// An address that was quiet for so long begins anew.
const FORGET: Duration = Duration::from_secs(3600);
/// Addresses that are remembered; beyond it those that were quiet longest are forgotten.
const ADDRESSES_MAX: usize = 10_000;

#[derive(Debug)]
struct Failures {
    count: u32,
    last: Instant,
}

/// Wrong passwords, by where they came from.
#[derive(Debug, Default)]
pub(super) struct Attempts(Mutex<HashMap<IpAddr, Failures>>);

impl Attempts {
    /// How long this address must wait before a password of it is looked at; `None` where it need not.
    pub(super) fn wait(&self, peer: IpAddr) -> Option<Duration> {
        let failures = self.0.lock();
        let Failures { count, last } = failures.get(&network(peer))?;
        let beyond = count.checked_sub(FREE)?;
        let wait = WAIT_MIN.saturating_mul(2u32.saturating_pow(beyond)).min(WAIT_MAX);
        let left = wait.saturating_sub(last.elapsed());
        (!left.is_zero()).then_some(left)
    }

    pub(super) fn failed(&self, peer: IpAddr) {
        let mut failures = self.0.lock();
        if failures.len() >= ADDRESSES_MAX {
            failures.retain(|_, one| one.last.elapsed() < FORGET);
            if failures.len() >= ADDRESSES_MAX
                && let Some(oldest) = failures.iter().min_by_key(|(_, one)| one.last).map(|(peer, _)| *peer)
            {
                failures.remove(&oldest);
            }
        }
        let now = Instant::now();
        let one = failures.entry(network(peer)).or_insert(Failures { count: 0, last: now });
        if now.duration_since(one.last) >= FORGET {
            one.count = 0;
        }
        one.count = one.count.saturating_add(1);
        one.last = now;
    }
}

/// Whoever has one IPv6 address has a network of them.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((u128::from(address) >> 64 << 64).into()),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_guesses_waits_longer_and_longer_and_others_do_not() {
        let attempts = Attempts::default();
        let [peer, other] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse::<IpAddr>().unwrap());
        for _ in 0..FREE {
            assert_eq!(attempts.wait(peer), None);
            attempts.failed(peer);
        }
        let mut guesses = 0;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(24 * 3600) {
            tokio::time::advance(attempts.wait(peer).unwrap_or_default()).await;
            assert_eq!(attempts.wait(peer), None);
            attempts.failed(peer);
            guesses += 1;
        }
        assert!(guesses < 120, "{guesses} guesses a day");
        assert_eq!(attempts.wait(other), None);
        tokio::time::advance(FORGET).await;
        attempts.failed(peer);
        assert_eq!(attempts.wait(peer), None);
    }

    #[test]
    fn a_network_of_addresses_counts_as_one_and_all_networks_have_a_bound() {
        let attempts = Attempts::default();
        for number in 0..=FREE {
            attempts.failed(format!("2001:db8::{number:x}").parse().unwrap());
        }
        assert!(attempts.wait("2001:db8::ffff".parse().unwrap()).is_some());
        for number in 0..ADDRESSES_MAX as u32 + 10 {
            attempts.failed(std::net::Ipv4Addr::from(number).into());
        }
        assert!(attempts.0.lock().len() <= ADDRESSES_MAX);
    }
}
