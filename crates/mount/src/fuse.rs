//! The thin wrapper between fuser and [`Files`], and the one place where errors become errnos.
//!
//! Budget: an answer from the tree 5 µs, a read of one cached frame 100 µs, and no lock held while replying.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use lamina_image::{FileKind, Ino, Inode, Tree, TreeError};
use tokio::runtime::Handle;
use tracing::{debug, warn};

use crate::boot::{BROUGHT, is_brought};
use crate::fs::{Answer, Files, FsError};
use crate::metrics::{add, one};
use crate::opens::Opens;
use crate::passthrough::Passthrough;
use crate::whole::Wholes;

/// Nothing ever changes: ten years.
const TTL: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Requests that the kernel has under way by itself (readahead); its default of 12 throttles parallel readers.
const BACKGROUND_MAX: u16 = 128;
/// What is negotiated, each where the kernel has it.
const CAPABILITIES: [InitFlags; 5] = [
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_NO_OPENDIR_SUPPORT,
    InitFlags::FUSE_ALLOW_IDMAP,
];
const BLOCK_BYTES: u32 = 4096;
/// How deep file systems may be stacked: a backing file on a plain file system, and one overlayfs on this mount.
const STACK_DEPTH: u32 = 1;
/// The file handle of most opens.
const UNCOUNTED: FileHandle = FileHandle(0);
/// That of those that are counted until they are released.
const COUNTED: FileHandle = FileHandle(1);

/// What fuser drives.
pub(crate) struct Fuse {
    pub(crate) files: Files,
    pub(crate) handle: Handle,
    /// Where it says what was agreed with the kernel.
    pub(crate) agreed: Arc<OnceLock<Agreed>>,
    /// Its big files, where the kernel may read them by itself.
    pub(crate) passthrough: Option<Arc<Passthrough>>,
}

/// What a first request came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Agreed {
    /// The kernel's minor version of the protocol.
    pub(crate) minor: u32,
    /// Those that were asked for and the kernel has.
    pub(crate) capabilities: InitFlags,
}

/// The errno of each error.
fn errno(error: &FsError) -> Errno {
    match error {
        FsError::Tree(TreeError::Kind(_, "directory")) => Errno::ENOTDIR,
        FsError::Tree(TreeError::Kind(..)) => Errno::EINVAL,
        FsError::Tree(_) | FsError::Cache(_) => Errno::EIO,
        FsError::NoXattr => Errno::NO_XATTR,
        // the kernel never asks this mount again
        FsError::NoXattrs => Errno::ENOSYS,
    }
}

fn kind(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base.and_then(|base| base.checked_add(Duration::from_nanos(nanoseconds.into()))).unwrap_or(UNIX_EPOCH)
}

fn attributes(ino: Ino, inode: &Inode) -> FileAttr {
    let mtime = time(inode.mtime_s, inode.mtime_ns);
    FileAttr {
        ino: INodeNo(ino.0),
        size: inode.size,
        blocks: inode.size.div_ceil(512),
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: kind(inode.kind()),
        perm: u16::try_from(inode.mode & 0o7777).expect("12 bits"),
        nlink: inode.nlink,
        uid: inode.uid,
        gid: inode.gid,
        rdev: inode.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// The answer for a name that does not exist: inode 0, which the kernel remembers.
fn absent() -> FileAttr {
    bare(Ino(0), FileType::RegularFile, 0)
}

/// The directory that only the boot finds.
fn brought() -> FileAttr {
    bare(BROUGHT, FileType::Directory, 0o500)
}

/// Nothing but what it is, and of root.
fn bare(ino: Ino, kind: FileType, perm: u16) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino.0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// The names of a directory from position `from` on, `.` and `..` first, each with the position after it. Stops when
/// `take` says that it is full.
fn list(
    tree: &Tree,
    dir: Ino,
    from: u64,
    mut take: impl FnMut(&[u8], Ino, FileKind, u64) -> Result<bool, FsError>,
) -> Result<(), FsError> {
    let entries = tree.entries(dir)?;
    for position in from..u64::from(entries.len()) + 2 {
        let (name, ino, kind): (&[u8], _, _) = match position {
            0 => (b".", dir, FileKind::Directory),
            1 => (b"..", tree.parent(dir)?, FileKind::Directory),
            after => {
                let entry = entries.at(u32::try_from(after - 2).expect("below a u32"))?;
                (entry.name, entry.ino, entry.kind)
            }
        };
        if take(name, ino, kind, position + 1)? {
            break;
        }
    }
    Ok(())
}

impl Fuse {
    fn tree(&self) -> &Tree {
        &self.files.ahead.tree
    }

    /// The big files, and which are open, where the mount does passthrough.
    fn passthrough(&self) -> Option<(&Wholes, &Opens)> {
        let passthrough = self.passthrough.as_ref()?;
        Some((&passthrough.wholes, passthrough.opens()?))
    }

    fn attributes(&self, ino: Ino) -> Result<FileAttr, FsError> {
        match ino {
            BROUGHT => Ok(brought()),
            ino => Ok(attributes(ino, &self.tree().inode(ino)?)),
        }
    }

    /// A directory is listed, from its beginning or from further on.
    fn listing(&self, req: &Request, dir: INodeNo, offset: u64) {
        one(&self.files.ahead.counters.readdirs);
        if offset == 0 {
            self.name(req, dir, b".");
        }
    }

    /// A name is looked up. What the boot asks for itself is not recorded: a start's trace would have all that its boot pack has.
    fn name(&self, req: &Request, dir: INodeNo, name: &[u8]) {
        if !self.files.boot.asks(req.pid()) {
            self.files.recorder.name(Ino(dir.0), name);
        }
    }

    fn found(&self, parent: Ino, name: &OsStr) -> Result<FileAttr, FsError> {
        match self.tree().lookup(parent, name.as_bytes())? {
            Some(ino) => self.attributes(ino),
            None => Ok(absent()),
        }
    }

    /// Answers a read of `size` bytes at an offset of a file.
    fn answer(files: &Files, handle: &Handle, (ino, offset, size): (Ino, u64, u32), reply: ReplyData) {
        match files.read(ino, offset, size) {
            Ok((Answer::Now(bytes), touched)) => {
                let note = || touched.as_ref().map(|touched| files.note(ino, offset, size, touched));
                // what is recorded is so in the order of the reads: the reader's next may come while this one is noted
                let is_recording = files.recorder.is_recording();
                let before = is_recording.then(note).flatten();
                let head = (offset == 0).then(|| bytes.clone());
                Self::send(files, ino, Ok(bytes), reply);
                let in_stream = if is_recording { before } else { note() };
                if let (Some(touched), Some(in_stream)) = (&touched, in_stream) {
                    files.store_rest(ino, offset, size, touched, in_stream);
                    // who reads file after file does not load them
                    let head = head.filter(|_| !in_stream);
                    head.iter().for_each(|head| files.loading.note(ino, head));
                }
            }
            Ok((Answer::Later(unread), touched)) => {
                let touched = touched.unwrap_or_default();
                let in_stream = files.note(ino, offset, size, &touched);
                let files = files.clone();
                if offset > 0 && !in_stream {
                    files.loading.missed(ino);
                }
                handle.spawn(async move {
                    let answer = files.complete(unread).await;
                    let head = answer.as_ref().ok().filter(|_| offset == 0 && !in_stream).cloned();
                    Self::send(&files, ino, answer, reply);
                    head.iter().for_each(|head| files.loading.note(ino, head));
                    files.store_rest(ino, offset, size, &touched, in_stream);
                });
            }
            Ok((Answer::Soon(soon), _)) => {
                let files = files.clone();
                handle.spawn(async move {
                    let answer = files.soon(ino, offset, size, soon).await;
                    Self::send(&files, ino, answer, reply);
                });
            }
            Err(FsError::Tree(TreeError::Coming)) => {
                let (files, again) = (files.clone(), handle.clone());
                handle.spawn(async move {
                    match files.contents().await {
                        Ok(()) => Self::answer(&files, &again, (ino, offset, size), reply),
                        Err(error) => Self::send(&files, ino, Err(error), reply),
                    }
                });
            }
            Err(error) => Self::send(files, ino, Err(error), reply),
        }
    }

    fn send(files: &Files, ino: Ino, answer: Result<bytes::Bytes, FsError>, reply: ReplyData) {
        let counters = &files.ahead.counters;
        match answer {
            Ok(bytes) => {
                add(&counters.read_bytes, bytes.len() as u64);
                reply.data(&bytes);
            }
            Err(error) => {
                // before the answer: who has it may look at once
                let before = counters.reads_failed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                reply.error(errno(&error));
                // the first, the second, the fourth and so on: enough to see it, not enough to fill a disk
                if (before + 1).is_power_of_two() {
                    warn!(inode = ino.0, failed = before + 1, %error, "a read fails");
                } else {
                    debug!(inode = ino.0, %error, "a read fails");
                }
            }
        }
    }
}

/// Answers an xattr request of `size` bytes, where 0 asks for the length.
fn send_xattr(answer: Result<&[u8], FsError>, size: u32, reply: ReplyXattr) {
    match answer {
        Ok(bytes) => match (u32::try_from(bytes.len()), size) {
            (Ok(len), 0) => reply.size(len),
            (Ok(len), size) if len <= size => reply.data(bytes),
            _ => reply.error(Errno::ERANGE),
        },
        Err(error) => reply.error(errno(&error)),
    }
}

impl Filesystem for Fuse {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut capabilities = InitFlags::empty();
        let mut negotiate = |config: &mut KernelConfig, capability| {
            let lacking = config.add_capabilities(capability).is_err();
            match lacking {
                true => debug!(?capability, "the kernel lacks a capability"),
                false => capabilities |= capability,
            }
            !lacking
        };
        for capability in CAPABILITIES {
            negotiate(config, capability);
        }
        if self.passthrough.is_some() && negotiate(config, InitFlags::FUSE_PASSTHROUGH) {
            let _ = config.set_max_stack_depth(STACK_DEPTH);
        } else {
            negotiate(config, InitFlags::FUSE_NO_OPEN_SUPPORT);
        }
        let _ = self.agreed.set(Agreed { minor: config.kernel_abi().1, capabilities });
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let counters = &self.files.ahead.counters;
        if is_brought(self.tree(), Ino(parent.0), name) {
            // not kept, neither of them: the next who asks for it is told the other thing
            let is_asker = self.files.boot.asks(req.pid());
            let attr = if is_asker { brought() } else { absent() };
            return reply.entry_with_ttls(&TTL, &Duration::ZERO, &attr, Generation(0));
        }
        if Ino(parent.0) == BROUGHT {
            let found = self.files.boot.brought_as(name).and_then(|ino| self.attributes(ino).ok());
            return reply.entry(&TTL, &found.unwrap_or_else(absent), Generation(0));
        }
        one(&counters.lookups);
        self.name(req, parent, name.as_bytes());
        match self.found(Ino(parent.0), name) {
            Ok(attr) => {
                if attr.ino.0 == 0 {
                    one(&counters.lookups_absent);
                }
                reply.entry(&TTL, &attr, Generation(0));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        one(&self.files.ahead.counters.getattrs);
        match self.attributes(Ino(ino.0)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        one(&self.files.ahead.counters.readlinks);
        match self.tree().symlink(Ino(ino.0)) {
            Ok(target) => reply.data(target),
            Err(error) => reply.error(errno(&error.into())),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let Some((wholes, opens)) = self.passthrough() else {
            let agreed = self.agreed.get().map_or(InitFlags::empty(), |agreed| agreed.capabilities);
            // a kernel that has passthrough takes it though nobody said so
            let takes_it = InitFlags::FUSE_NO_OPEN_SUPPORT | InitFlags::FUSE_PASSTHROUGH;
            return match agreed.intersects(takes_it) {
                // nothing is kept of who has a file open: the kernel stops asking, and keeps pages as below (fs/fuse/file.c,
                // fuse_file_open). Where it has a backing file for the inode it reads by pages too, but maps nothing until that is
                // closed (ENODEV; fuse_file_mmap there)
                true => reply.error(Errno::ENOSYS),
                false => reply.opened(UNCOUNTED, FopenFlags::FOPEN_KEEP_CACHE),
            };
        };
        let ino = Ino(ino.0);
        if !wholes.is_big(ino) {
            return reply.opened(UNCOUNTED, FopenFlags::FOPEN_KEEP_CACHE);
        }
        let counters = &self.files.ahead.counters;
        let Some(backing) = opens.open(ino, || wholes.find(ino)) else {
            one(&counters.passthrough_misses);
            if opens.is_past() {
                wholes.ask(ino);
            }
            return reply.opened(COUNTED, FopenFlags::FOPEN_KEEP_CACHE);
        };
        one(&counters.passthrough_opens);
        #[expect(
            unsafe_code,
            reason = "the kernel knows backing files by number, and numbers outlive processes"
        )]
        // SAFETY: the number is in use, since it is in the table, and what is made of it gives it up again below
        let backing = unsafe { reply.wrap_backing(backing) };
        reply.opened_passthrough(COUNTED, FopenFlags::empty(), &backing);
        backing.into_raw();
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // nothing is ever written: the kernel stops asking. fuser would warn of it at every mount
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
        let (Some((wholes, opens)), COUNTED) = (self.passthrough(), fh) else { return };
        if opens.release(Ino(ino.0)) && opens.is_past() {
            // what was read may be all of it
            wholes.ask(Ino(ino.0));
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        one(&self.files.ahead.counters.reads);
        Self::answer(&self.files, &self.handle, (Ino(ino.0), offset, size), reply);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // directories need no opening: the kernel stops asking, and caches what they list
        reply.error(Errno::ENOSYS);
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.listing(req, ino, offset);
        let listed = list(self.tree(), Ino(ino.0), offset, |name, ino, of, next| {
            Ok(reply.add(INodeNo(ino.0), next, kind(of), OsStr::from_bytes(name)))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn readdirplus(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        if Ino(ino.0) == BROUGHT {
            for (ino, next) in self.files.boot.brought(offset).iter().zip(offset + 1..) {
                let Ok(attr) = self.attributes(*ino) else { continue };
                // its name is its position
                if reply.add(attr.ino, next, next.to_string(), &TTL, &attr, Generation(0)) {
                    break;
                }
            }
            return reply.ok();
        }
        let boot = &self.files.boot;
        let wanted = boot.asks(req.pid())
            && boot.list_wanted(Ino(ino.0), offset, |name, ino, next| {
                // who is asked for less than there is looks up the rest
                let Ok(attr) = self.attributes(ino) else { return true };
                reply.add(attr.ino, next, name, &TTL, &attr, Generation(0))
            });
        if wanted {
            return reply.ok();
        }
        self.listing(req, ino, offset);
        let listed = list(self.tree(), Ino(ino.0), offset, |name, ino, _, next| {
            let attr = self.attributes(ino)?;
            Ok(reply.add(INodeNo(ino.0), next, OsStr::from_bytes(name), &TTL, &attr, Generation(0)))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let tree = self.tree();
        let blocks = tree.file_bytes().div_ceil(u64::from(BLOCK_BYTES));
        reply.statfs(blocks, 0, 0, tree.inodes().into(), 0, BLOCK_BYTES, 255, BLOCK_BYTES);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        one(&self.files.ahead.counters.xattrs);
        send_xattr(self.files.xattr(Ino(ino.0), name.as_bytes()), size, reply);
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        one(&self.files.ahead.counters.xattrs);
        match self.files.xattr_names(Ino(ino.0)) {
            Ok(names) => send_xattr(Ok(&names), size, reply),
            Err(error) => send_xattr(Err(error), size, reply),
        }
    }
}
