//! Who a program runs as, by the names that its image has for users and groups (passwd(5), group(5)).

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};
use rustix::fs::{Gid, Uid};

/// More of an image's `/etc/passwd` or `/etc/group` is not read, in bytes: some 10,000 users.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The kernel's own bound, NGROUPS_MAX.
const GROUPS_MAX: usize = 65_536;

/// Who a program runs as.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct User {
    /// Nobody else than whoever started it, if there are none.
    pub(super) ids: Option<(Uid, Gid)>,
    /// The groups it is in besides.
    pub(super) groups: Vec<Gid>,
    pub(super) home: String,
}

/// Finds `user[:group]` in the root directory. Nothing is read for nobody in particular, who is root.
pub(super) fn user(wanted: &str) -> Result<User> {
    if wanted.is_empty() {
        return Ok(User { ids: None, groups: Vec::new(), home: "/root".to_owned() });
    }
    find(wanted, &read("/etc/passwd")?, &read("/etc/group")?)
        .with_context(|| format!("the image has no user {wanted}"))
}

/// A file, or nothing where there is none. Nobody is waited for, as a FIFO has its readers do, whatever the image has there.
fn read(path: &str) -> Result<String> {
    if !fs::metadata(path).is_ok_and(|found| found.is_file()) {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    let mut options = File::options();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path);
    file.and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes))
        .with_context(|| path.to_owned())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// As docker has it: a name before a number, a number that nobody has is taken as it is and in the group 0; whoever names a group
/// is in that one only.
fn find(wanted: &str, passwd: &str, group: &str) -> Option<User> {
    let (name, wanted_group) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
        None => (wanted, None),
    };
    let users = || passwd.lines().filter_map(Entry::of_user);
    let number = id(name);
    let known =
        users().find(|user| user.name == name).or_else(|| users().find(|user| Some(user.id) == number));
    let uid = known.as_ref().map(|user| user.id).or(number)?;
    let groups = || group.lines().filter_map(Entry::of_group);
    let gid = match wanted_group {
        Some(wanted) => groups().find(|group| group.name == wanted).map(|group| group.id).or(id(wanted))?,
        None => known.as_ref().map_or(0, |user| user.group),
    };
    let members = groups().filter(|group| {
        let member = known.as_ref().map(|user| user.name);
        wanted_group.is_none() && group.rest.split(',').any(|one| Some(one) == member)
    });
    let groups = members.take(GROUPS_MAX).map(|group| Gid::from_raw(group.id)).collect();
    let home = known.map(|user| user.rest).filter(|home| !home.is_empty()).unwrap_or("/");
    Some(User { ids: Some((Uid::from_raw(uid), Gid::from_raw(gid))), groups, home: home.to_owned() })
}

/// -1 means nobody to the kernel.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX && text.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A line of one of the files.
struct Entry<'a> {
    name: &'a str,
    id: u32,
    /// A user's group.
    group: u32,
    /// A user's home, or a group's members.
    rest: &'a str,
}

impl<'a> Entry<'a> {
    /// `name:password:uid:gid:comment:home:shell`
    fn of_user(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let number = fields.nth(1).and_then(id)?;
        let group = fields.next().and_then(id)?;
        Some(Self { name, id: number, group, rest: fields.nth(1).unwrap_or_default() })
    }

    /// `name:password:gid:members`
    fn of_group(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let number = fields.nth(1).and_then(id)?;
        Some(Self { name, id: number, group: number, rest: fields.next().unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:100::/srv/app:\n7:x:8:9::/seven:\nbroken:x\n";
    const GROUP: &str = "root:x:0:\nvideo:x:44:app,other\nrender:x:105:app\nstaff:x:50:other\n";

    fn found(wanted: &str) -> Option<(u32, u32, Vec<u32>, String)> {
        let User { ids, groups, home } = find(wanted, PASSWD, GROUP)?;
        let (uid, gid) = ids?;
        Some((uid.as_raw(), gid.as_raw(), groups.iter().map(|group| group.as_raw()).collect(), home))
    }

    #[test]
    fn users_are_found_as_docker_finds_them() {
        let cases = [
            ("app", (1000, 100, vec![44, 105], "/srv/app")),
            ("1000", (1000, 100, vec![44, 105], "/srv/app")),
            ("app:staff", (1000, 50, vec![], "/srv/app")),
            ("app:7", (1000, 7, vec![], "/srv/app")),
            ("app:", (1000, 100, vec![44, 105], "/srv/app")),
            ("4242", (4242, 0, vec![], "/")),
            ("4242:4243", (4242, 4243, vec![], "/")),
            ("7", (8, 9, vec![], "/seven")),
            ("root", (0, 0, vec![], "/root")),
        ];
        for (wanted, (uid, gid, groups, home)) in cases {
            assert_eq!(found(wanted), Some((uid, gid, groups, home.to_owned())), "{wanted}");
        }
        for wanted in ["nobody", "broken", "app:nobody", "4294967295", "-1", "+1", ":app", ""] {
            assert_eq!(found(wanted), None, "{wanted}");
        }
    }

    proptest! {
        #[test]
        fn no_file_makes_a_user_of_minus_one_or_a_panic(wanted in ".{0,12}", passwd in "([a-z0-9:,\n-]|.){0,200}", group in "([a-z0-9:,\n-]|.){0,200}") {
            if let Some(User { ids: Some((uid, gid)), .. }) = find(&wanted, &passwd, &group) {
                prop_assert!(uid.as_raw() != u32::MAX && gid.as_raw() != u32::MAX);
            }
        }
    }
}
