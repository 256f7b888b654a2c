//! The page-fault server, with a VMM written from Firecracker's documentation: what a guest reads is the image's bytes once, and zeroes after it
//! gave a page back; whatever else a VMM does is an end with a name.
//!
//! Where userfaultfd(2) is not permitted the tests say so and pass, unless OFFSHOOT_REQUIRE=all is set: then they fail.
#![cfg(all(feature = "uffd", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

#[allow(dead_code, reason = "the figures that share it use more of it")]
#[path = "uffd/vmm.rs"]
mod vmm;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use offshoot::backing::{Backing, Cut, FileImage, Heap, Mapped};
use offshoot::frontend::uffd::{
    End, FaultCounts, FaultService, HandshakeError, MapError, Server, ServerLimits, SocketMode, StartError, Stop,
    Unreadable, serve,
};
use offshoot::image::Source;
use offshoot::page::{ByteOffset, ByteSize, Geometry, PageCount, PageSize};
use offshoot::store::DiskDir;
use offshoot::testing::faults::{Refusal, fail_nth_call};
use offshoot::testing::{ByteSource, Dice};
use offshoot::{SpaceError, Tree};
use proptest::prelude::*;
use vmm::{
    EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP, MISSING, Memory, PAGE, Uffd, Vmm, WRITE_PROTECT, send, told,
};

/// Whether this machine lets us; says so aloud where it does not.
fn permitted() -> bool {
    let Err(error) = Uffd::with(EVENT_REMOVE) else { return true };
    let required = std::env::var("OFFSHOOT_REQUIRE").is_ok_and(|required| required == "all");
    assert!(!required, "OFFSHOOT_REQUIRE=all, but there is no userfaultfd: {error}");
    eprintln!("SKIPPED: no userfaultfd: {error}");
    false
}

/// A folder that goes with its value.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("offshoot-uffd-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _left = std::fs::remove_dir_all(&self.0);
    }
}

/// Content by page: every fourth page is zeroes.
fn content(pages: usize, seed: u64) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    let mut bytes = vec![0; pages * PAGE];
    for (page, bytes) in bytes.chunks_exact_mut(PAGE).enumerate() {
        if page % 4 != 3 {
            bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&(dice.next() | 1).to_ne_bytes()));
        }
    }
    bytes
}

/// A server of an image, and the ends it tells of.
struct Serving {
    server: Option<Server>,
    ends: mpsc::Receiver<(String, Option<u32>, FaultCounts)>,
    path: PathBuf,
    _folder: Folder,
}

impl Serving {
    fn new(image: Arc<dyn Source>, service: FaultService) -> Self {
        let folder = Folder::new();
        let path = folder.0.join("s");
        let (told, ends) = mpsc::channel();
        let told = Mutex::new(told);
        let notice = move |served: &offshoot::frontend::uffd::Served| {
            let _test_is_over = told.lock().unwrap().send((format!("{:?}", served.end), served.pid, served.counts));
        };
        let limits = ServerLimits { service, ..ServerLimits::default() };
        let server = Server::start(&path, SocketMode::OWNER, image, limits, notice).unwrap();
        Self { server: Some(server), ends, path, _folder: folder }
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    /// Shuts the server down. What the last page's waiter has seen is counted a moment later, and then for certain.
    fn counts_at_the_end(mut self) -> FaultCounts {
        self.server.take().unwrap().shutdown();
        self.ends.recv_timeout(Duration::from_secs(60)).expect("an end").2
    }

    /// Waits for a VMM's end.
    fn end(&self) -> String {
        self.ends.recv_timeout(Duration::from_secs(60)).expect("an end").0
    }
}

fn services() -> Vec<FaultService> {
    let service = |workers, window| FaultService { workers, window: PageCount::new(window), ..FaultService::default() };
    vec![service(1, 1), service(1, 16), service(3, 1), service(2, 64)]
}

fn compare(vmm: &Vmm, bytes: &[u8], what: &str) {
    for (memory, offset) in &vmm.regions {
        for page in 0..memory.len() / PAGE {
            let expected = &bytes[offset + page * PAGE..][..PAGE];
            assert!(memory.page(page) == expected, "{what}: page {page} of the region at {offset:#x}");
        }
    }
}

#[test]
fn every_kind_of_image_is_read_as_it_is() {
    if !permitted() {
        return;
    }
    let pages = 96;
    let bytes = content(pages, 1);
    let geometry = Geometry::new(ByteSize::new(bytes.len() as u64), PageSize::KIB_4).unwrap();
    let base = || Arc::new(ByteSource::new(bytes.clone()));
    /// Three cuts deep: as the base, but that pages were overwritten and put right again.
    fn deep<B: Backing>(space: &B, bytes: &[u8]) -> Arc<dyn Source> {
        let whole = |page: usize, fill: &[u8]| space.write(ByteOffset::new((page * PAGE) as u64), fill).unwrap();
        let mut image = None;
        for page in [5, 11, 3] {
            whole(page, &[0xEE; PAGE]);
            space.cut().unwrap().commit();
            whole(page, &bytes[page * PAGE..][..PAGE]);
            image = Some(space.cut().unwrap().commit().0);
        }
        Arc::new(image.unwrap())
    }
    let tree = Tree::default();
    let folder = Folder::new();
    let file = folder.0.join("image");
    std::fs::write(&file, &bytes).unwrap();
    std::fs::create_dir(folder.0.join("disks")).unwrap();
    let disks = DiskDir::open(folder.0.join("disks"), &tree).unwrap();
    let images: [(&str, Arc<dyn Source>); 5] = [
        ("heap", deep::<Heap>(&Heap::create(&tree, geometry, Some(base())).unwrap(), &bytes)),
        ("mapped", deep(&Mapped::create(&tree, geometry, Some(base())).unwrap(), &bytes)),
        ("durable", deep(&disks.create(geometry, Some(base())).unwrap(), &bytes)),
        ("file", Arc::new(FileImage::open(&file, None).unwrap())),
        ("bytes", base()),
    ];
    for (what, image) in images {
        for service in services() {
            let serving = Serving::new(image.clone(), service);
            // Not in order of addresses, and not all of the image.
            let vmm = Vmm::restore(&serving.path, &[(40, 32), (20, 0), (24, 72)]);
            compare(&vmm, &bytes, what);
            let counts = serving.counts_at_the_end();
            assert_eq!(counts.copied + counts.zeroes, 84, "each page once");
            assert_eq!(counts.zeroes, 21);
            assert!(counts.faults <= 84 && counts.faults >= 84 / service.window.get(), "{counts:?}");
        }
    }
}

#[test]
fn what_was_given_back_reads_as_zeroes() {
    if !permitted() {
        return;
    }
    let bytes = content(64, 2);
    for service in services() {
        let serving = Serving::new(Arc::new(ByteSource::new(bytes.clone())), service);
        let vmm = Vmm::restore(&serving.path, &[(64, 0)]);
        let memory = vmm.memory();
        // Read, written, and never touched.
        memory.page(10);
        memory.write(11 * PAGE + 7, 0x77);
        memory.drop_pages(9, 4);
        for page in 9..13 {
            assert_eq!(memory.page(page), vec![0; PAGE], "page {page}");
        }
        // Written after it was given back, and again given back.
        memory.write(12 * PAGE, 5);
        assert_eq!(memory.read(12 * PAGE), 5);
        memory.drop_pages(12, 1);
        assert_eq!(memory.page(12), vec![0; PAGE]);
        for page in (0..9).chain(13..64) {
            assert!(memory.page(page) == bytes[page * PAGE..][..PAGE], "page {page}");
        }
        assert!(serving.server().counts().dropped <= 4);
    }
}

/// A VMM that asked for no `remove` events gives memory back all the same.
#[test]
fn without_remove_events_what_was_touched_and_dropped_reads_as_zeroes() {
    if !permitted() {
        return;
    }
    let serving = Serving::new(Arc::new(ByteSource::new(content(8, 3))), FaultService::default());
    let vmm = Vmm::new(&[(8, 0)], 0, MISSING);
    let socket = UnixStream::connect(&serving.path).unwrap();
    vmm.shake_hands(&socket);
    assert_ne!(vmm.memory().page(2), vec![0; PAGE]);
    vmm.memory().drop_pages(0, 8);
    assert_eq!(vmm.memory().page(2), vec![0; PAGE]);
    assert_eq!(serving.server().counts().dropped, 0);
}

#[test]
fn many_vmms_and_many_vcpus_at_once() {
    if !permitted() {
        return;
    }
    let bytes = Arc::new(content(256, 4));
    for service in services() {
        let serving = Serving::new(Arc::new(ByteSource::new(bytes.to_vec())), service);
        let vmms: Vec<_> = (0..6).map(|_| Vmm::restore(&serving.path, &[(128, 0), (128, 128)])).collect();
        thread::scope(|scope| {
            for (vmm, number) in vmms.iter().zip(0..) {
                for vcpu in 0..4 {
                    let bytes = &bytes;
                    scope.spawn(move || {
                        let mut dice = Dice::new(number * 10 + vcpu);
                        for _ in 0..300 {
                            let (region, page) = (dice.below(2) as usize, dice.below(128) as usize);
                            let (memory, offset) = &vmm.regions[region];
                            assert!(memory.page(page) == bytes[offset + page * PAGE..][..PAGE]);
                        }
                    });
                }
            }
        });
        assert_eq!(serving.server().vmms(), 6);
        let counts = serving.server().counts();
        assert!(counts.copied + counts.zeroes <= 6 * 256, "no page twice: {counts:?}");
    }
}

/// Others fault on pages that are being dropped: the image's bytes never come back after a drop.
#[test]
fn a_drop_wins_over_a_fault_that_is_being_answered() {
    if !permitted() {
        return;
    }
    const PAGES: usize = 48;
    // No zero pages: a page of zeroes was dropped.
    let bytes: Vec<u8> = (0..PAGES * PAGE).map(|at| (at / PAGE % 255 + 1) as u8).collect();
    for service in services() {
        let serving = Serving::new(Arc::new(ByteSource::new(bytes.clone())), service);
        for _ in 0..6 {
            let vmm = Vmm::restore(&serving.path, &[(PAGES, 0)]);
            let dropped: Vec<_> = (0..PAGES).map(|_| AtomicBool::new(false)).collect();
            thread::scope(|scope| {
                for seed in 0..3 {
                    let (vmm, dropped) = (&vmm, &dropped);
                    scope.spawn(move || {
                        let mut dice = Dice::new(seed);
                        for _ in 0..400 {
                            let page = dice.below(PAGES as u64) as usize;
                            let gone = dropped[page].load(Ordering::SeqCst);
                            let byte = vmm.memory().read(page * PAGE + 9);
                            let image = page as u8 + 1;
                            assert!(byte == 0 || (byte == image && !gone), "page {page}: {byte} after a drop: {gone}");
                        }
                    });
                }
                scope.spawn(|| {
                    let mut dice = Dice::new(77);
                    for _ in 0..60 {
                        let page = dice.below(PAGES as u64 - 3) as usize;
                        vmm.memory().drop_pages(page, 3);
                        dropped[page..page + 3].iter().for_each(|page| page.store(true, Ordering::SeqCst));
                    }
                });
            });
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Read(usize),
    Write(usize, u8),
    Drop(usize, usize),
}

const MODEL_PAGES: usize = 40;

fn op() -> impl Strategy<Value = Op> {
    let page = 0..MODEL_PAGES;
    prop_oneof![
        4 => page.clone().prop_map(Op::Read),
        2 => (page.clone(), any::<u8>()).prop_map(|(page, byte)| Op::Write(page, byte)),
        1 => (page, 1..8usize).prop_map(|(page, count)| Op::Drop(page, count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn histories_agree_with_a_vector(ops in prop::collection::vec(op(), 1..80), which in 0..4usize, seed in 0..50u64) {
        if permitted() {
            let mut model = content(MODEL_PAGES, seed);
            let serving = Serving::new(Arc::new(ByteSource::new(model.clone())), services()[which]);
            // Two regions, so that a drop may end at an edge.
            let vmm = Vmm::restore(&serving.path, &[(MODEL_PAGES / 2, 0), (MODEL_PAGES / 2, MODEL_PAGES / 2)]);
            let find = |page: usize| (&vmm.regions[page / (MODEL_PAGES / 2)].0, page % (MODEL_PAGES / 2));
            for op in ops {
                match op {
                    Op::Read(page) => {
                        let (memory, at) = find(page);
                        prop_assert!(memory.page(at) == model[page * PAGE..][..PAGE], "page {}", page);
                    }
                    Op::Write(page, byte) => {
                        let (memory, at) = find(page);
                        memory.write(at * PAGE + 100, byte);
                        model[page * PAGE + 100] = byte;
                    }
                    Op::Drop(page, count) => {
                        let (memory, at) = find(page);
                        let count = count.min(MODEL_PAGES / 2 - at);
                        memory.drop_pages(at, count);
                        model[page * PAGE..(page + count) * PAGE].fill(0);
                    }
                }
            }
            compare(&vmm, &model, "at the end");
        }
    }
}

/// Larger pages are put whole, as a region of huge pages needs it.
#[test]
fn a_region_of_larger_pages_is_served_in_their_size() {
    if !permitted() {
        return;
    }
    let bytes = content(64, 5);
    let serving = Serving::new(Arc::new(ByteSource::new(bytes.clone())), FaultService::default());
    // An address that is a multiple of the size.
    let (vmm, len) = (Vmm::new(&[(128, 0)], EVENT_REMOVE, MISSING), 64 * PAGE as u64);
    let skipped = (len - vmm.memory().base() % len) % len;
    let base = vmm.memory().base() + skipped;
    let told = format!(r#"[{{"base_host_virt_addr":{base},"size":{len},"offset":0,"page_size_kib":65536}}]"#);
    let socket = UnixStream::connect(&serving.path).unwrap();
    send(&socket, told.as_bytes(), &[vmm.uffd.as_fd()]).unwrap();
    let first = skipped as usize / PAGE;
    for page in 0..64 {
        assert!(vmm.memory().page(first + page) == bytes[page * PAGE..][..PAGE], "page {page}");
    }
    assert_eq!(serving.server().counts().faults, 4, "16 pages at once");
}

/// Runs an ignored test of this program in a process of its own.
fn child(test: &str, socket: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", test, "--ignored", "--quiet"]).env("OFFSHOOT_UFFD_SOCKET", socket);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
#[ignore = "the VMM of a test, in a process of its own"]
fn a_vmm_that_reads_all_and_stays() {
    let Some(socket) = std::env::var_os("OFFSHOOT_UFFD_SOCKET") else { return };
    let vmm = Vmm::restore(Path::new(&socket), &[(16, 0)]);
    let bytes = content(16, 6);
    compare(&vmm, &bytes, "in another process");
    println!("read");
    loop {
        thread::park();
    }
}

#[test]
#[ignore = "the VMM of a test, in a process of its own"]
fn a_vmm_that_touches_one_page() {
    let Some(socket) = std::env::var_os("OFFSHOOT_UFFD_SOCKET") else { return };
    let vmm = Vmm::restore(Path::new(&socket), &[(16, 0)]);
    vmm.memory().read(0);
    std::process::exit(0);
}

#[test]
fn a_vmm_in_another_process_is_served_and_its_death_is_seen() {
    if !permitted() {
        return;
    }
    let serving = Serving::new(Arc::new(ByteSource::new(content(16, 6))), FaultService::default());
    let mut command = child("a_vmm_that_reads_all_and_stays", &serving.path);
    command.arg("--nocapture").stdout(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(process.stdout.take().unwrap()));
    assert!(lines.any(|line| line.is_ok_and(|line| line.contains("read"))), "it has read all pages");
    assert_eq!(serving.server().vmms(), 1);
    process.kill().unwrap();
    process.wait().unwrap();
    let (end, pid, _) = serving.ends.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!((end.as_str(), pid), ("Exited", Some(process.id())));
    serving.server.unwrap().shutdown();
}

#[test]
fn a_page_that_cannot_be_read_is_never_something_else() {
    if !permitted() {
        return;
    }
    let image = Arc::new(ByteSource::new(content(16, 7)));
    image.fail_after(0);
    let serving = Serving::new(image.clone(), FaultService::default());
    let status = child("a_vmm_that_touches_one_page", &serving.path).status().unwrap();
    let end = serving.end();
    if end == "Exited" {
        const SIGBUS: i32 = 7;
        assert_eq!(status.signal(), Some(SIGBUS), "{status}");
        assert_eq!(serving.server().counts().poisoned, 1);
    } else {
        // A kernel before 6.6: the VMM waits until somebody ends it, which needs somebody who knows.
        assert!(end.starts_with("Unreadable"), "{end}");
    }
}

/// A neighbour that cannot be read keeps nobody from a page that can.
#[test]
fn a_window_shrinks_where_part_of_it_cannot_be_read() {
    struct Hole(ByteSource);
    impl Source for Hole {
        fn len(&self) -> ByteSize {
            self.0.len()
        }
        fn read(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), SpaceError> {
            let bad = 5 * PAGE as u64;
            if at.get() <= bad && at.get() + buf.len() as u64 > bad {
                self.0.fail_after(0);
                let failed = self.0.read(at, buf);
                self.0.fail_after(u64::MAX);
                return failed;
            }
            self.0.read(at, buf)
        }
    }
    if !permitted() {
        return;
    }
    let bytes = content(16, 8);
    let service = FaultService { window: PageCount::new(8), unreadable: Unreadable::End, ..FaultService::default() };
    let serving = Serving::new(Arc::new(Hole(ByteSource::new(bytes.clone()))), service);
    let vmm = Vmm::restore(&serving.path, &[(16, 0)]);
    for page in [0, 4, 6, 7, 8, 15] {
        assert!(vmm.memory().page(page) == bytes[page * PAGE..][..PAGE], "page {page}");
    }
    touch_in_vain(vmm, 5, || assert!(serving.end().starts_with("Unreadable"), "the end is told"));
}

/// Touches a page that nobody gives; once `seen` returns the userfaultfd is closed, which lets the thread go.
fn touch_in_vain(vmm: Vmm, page: usize, seen: impl FnOnce()) {
    let Vmm { regions, uffd, .. } = vmm;
    thread::scope(|scope| {
        let memory: &Memory = &regions[0].0;
        scope.spawn(move || memory.read(page * PAGE));
        seen();
        drop(uffd);
    });
}

#[test]
fn events_that_cannot_be_served_end_by_name() {
    if !permitted() {
        return;
    }
    let serving = Serving::new(Arc::new(ByteSource::new(content(16, 9))), FaultService::default());
    let connected = |features, mode, pages: &[(usize, usize)]| {
        let vmm = Vmm::new(pages, features, mode);
        let socket = UnixStream::connect(&serving.path).unwrap();
        vmm.shake_hands(&socket);
        vmm
    };
    let moved = connected(EVENT_REMAP, MISSING, &[(16, 0)]);
    moved.memory().move_last_page();
    assert_eq!(serving.end(), "Event");

    let protected = connected(1, MISSING | WRITE_PROTECT, &[(16, 0)]);
    protected.memory().read(0);
    protected.uffd.protect(protected.memory().base(), PAGE as u64);
    let Vmm { regions, uffd, .. } = protected;
    thread::scope(|scope| {
        scope.spawn(|| regions[0].0.write(0, 1));
        assert!(serving.end().starts_with("OtherMode"));
        drop(uffd);
    });

    // More memory is registered than was told of.
    let wide = Vmm::new(&[(16, 0)], EVENT_REMOVE, MISSING);
    let socket = UnixStream::connect(&serving.path).unwrap();
    let part = told(&[(wide.memory().base(), 8 * PAGE, 0)]);
    send(&socket, part.as_bytes(), &[wide.uffd.as_fd()]).unwrap();
    wide.memory().read(0);
    touch_in_vain(wide, 12, || assert!(serving.end().starts_with("Outside")));

    // Unmapping is nothing special.
    let unmapped = connected(EVENT_UNMAP | EVENT_REMOVE, MISSING, &[(16, 0)]);
    unmapped.memory().unmap(4, 4);
    assert_eq!(unmapped.memory().page(3), content(16, 9)[3 * PAGE..][..PAGE]);
    // Known for certain once a later fault was answered.
    assert_eq!(serving.server().counts().dropped, 4);
}

#[test]
#[ignore = "the VMM of a test, in a process of its own"]
fn a_vmm_that_forks() {
    let Some(socket) = std::env::var_os("OFFSHOOT_UFFD_SOCKET") else { return };
    let vmm = Vmm::new(&[(16, 0)], EVENT_FORK | EVENT_REMOVE, MISSING);
    let socket = UnixStream::connect(socket).unwrap();
    vmm.shake_hands(&socket);
    vmm.memory().read(0);
    let mut command = Command::new("true");
    #[allow(unsafe_code, reason = "a hook has std fork rather than spawn")]
    // SAFETY: it does nothing.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, || Ok(()));
    }
    assert!(command.status().unwrap().success());
    compare(&vmm, &content(16, 10), "after a fork");
}

/// In a process of its own: who forks holds the allocator's locks until the event is read, and the server allocates.
#[test]
fn a_vmm_that_forks_is_served_on() {
    if !permitted() {
        return;
    }
    let serving = Serving::new(Arc::new(ByteSource::new(content(16, 10))), FaultService::default());
    assert!(child("a_vmm_that_forks", &serving.path).status().unwrap().success());
    assert_eq!(serving.end(), "Exited");
}

#[test]
fn hostile_clients_get_an_end_and_others_are_served() {
    if !permitted() {
        return;
    }
    let bytes = content(16, 11);
    let service = FaultService { handshake: Duration::from_secs(1), ..FaultService::default() };
    let serving = Serving::new(Arc::new(ByteSource::new(bytes.clone())), service);
    let connect = || UnixStream::connect(&serving.path).unwrap();
    let uffd = || Uffd::with(EVENT_REMOVE).unwrap();
    let good = told(&[(1 << 30, 4 * PAGE, 0)]);
    let end_of = |bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]| {
        let socket = connect();
        // It may be hung up on before all is sent.
        for piece in bytes.chunks(1 << 12) {
            let _refused = send(&socket, piece, if piece.as_ptr() == bytes.as_ptr() { fds } else { &[] });
        }
        serving.end()
    };
    let (one, other) = (uffd(), uffd());
    let pipe = std::io::pipe().unwrap();
    let overlapping = told(&[(1 << 30, 4 * PAGE, 0), ((1 << 30) + PAGE as u64, 4 * PAGE, 4 * PAGE)]);
    let far = told(&[(1 << 30, 17 * PAGE, 0)]);
    let long = format!("[{}", " ".repeat(100 << 10));
    for (bytes, fds, expected) in [
        ("hello", vec![one.as_fd()], "Map(Json"),
        ("[]", vec![one.as_fd()], "Map(Count(0))"),
        (overlapping.as_str(), vec![one.as_fd()], "Map(Overlap"),
        (far.as_str(), vec![one.as_fd()], "Map(PastTheEnd"),
        (good.as_str(), vec![], "NoDescriptor"),
        (good.as_str(), vec![one.as_fd(), other.as_fd()], "ManyDescriptors(2)"),
        (good.as_str(), vec![pipe.0.as_fd()], "NotUserfaultfd"),
        (&format!("{good}{good}"), vec![one.as_fd()], "More"),
        (&long, vec![one.as_fd()], "TooLong"),
        ("[{", vec![one.as_fd()], "TooSlow"),
        ("", vec![], "TooSlow"),
    ] {
        let end = end_of(bytes.as_bytes(), &fds);
        assert!(end.starts_with(&format!("Handshake({expected}")), "{bytes:.60}: {end}");
    }
    // Hung up in the middle.
    send(&connect(), b"[{\"base", &[one.as_fd()]).unwrap();
    assert_eq!(serving.end(), "Handshake(HungUp)");
    // A userfaultfd that the kernel has not been asked anything of.
    let socket = connect();
    send(&socket, good.as_bytes(), &[Uffd::bare().unwrap().as_fd()]).unwrap();
    assert!(serving.end().starts_with("System"), "not agreed with the kernel");
    // Talks after the hand-shake.
    let vmm = Vmm::new(&[(16, 0)], EVENT_REMOVE, MISSING);
    let socket = connect();
    vmm.shake_hands(&socket);
    vmm.memory().read(0);
    send(&socket, b"{}", &[]).unwrap();
    assert_eq!(serving.end(), "Talks");
    // And after all this, the next is served.
    compare(&Vmm::restore(&serving.path, &[(16, 0)]), &bytes, "after hostile ones");
}

#[test]
fn limits_are_kept_and_named() {
    let folder = Folder::new();
    let image = || Arc::new(ByteSource::new(vec![1; PAGE]));
    let start = |limits| Server::start(&folder.0.join("s"), SocketMode::OWNER, image(), limits, |_| {});
    let service = FaultService::default();
    for limits in [
        ServerLimits { vmms: 0, service },
        ServerLimits { vmms: 1, service: FaultService { workers: 0, ..service } },
        ServerLimits { vmms: 1, service: FaultService { window: PageCount::new(3), ..service } },
        ServerLimits { vmms: 1, service: FaultService { window: PageCount::new(1024), ..service } },
        ServerLimits { vmms: 1, service: FaultService { handshake: Duration::ZERO, ..service } },
    ] {
        assert!(matches!(start(limits), Err(StartError::Limits(_))), "{limits:?}");
    }
    let server = start(ServerLimits { vmms: 1, service }).unwrap();
    let first = UnixStream::connect(folder.0.join("s")).unwrap();
    while server.vmms() == 0 {
        thread::yield_now();
    }
    // Hung up on.
    let second = UnixStream::connect(folder.0.join("s")).unwrap();
    assert!(matches!(std::io::Read::read(&mut &second, &mut [0]), Ok(0)));
    assert!(matches!(start(ServerLimits::default()), Err(StartError::Listen { .. })), "somebody listens there");
    // In the middle of a hand-shake.
    server.shutdown();
    assert!(!folder.0.join("s").exists());
    drop(first);
}

/// Each call that the service makes fails once: the guest gets the right bytes, or the service ends and says so.
#[test]
fn every_failing_call_ends_by_name_or_is_got_over() {
    if !permitted() {
        return;
    }
    let bytes = content(8, 12);
    let image = ByteSource::new(bytes.clone());
    let outcomes = Mutex::new([0; 2]);
    for how in [Refusal::OutOfMemory, Refusal::Io, Refusal::OutOfDescriptors, Refusal::Interrupted] {
        for n in 1.. {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let stop = Stop::new().unwrap();
            let vmm = Vmm::new(&[(8, 0)], EVENT_REMOVE, MISSING);
            vmm.shake_hands(&theirs);
            let Vmm { regions, uffd, .. } = vmm;
            let over = AtomicBool::new(false);
            let seen = thread::scope(|scope| {
                let guest = scope.spawn(|| {
                    let memory = &regions[0].0;
                    for page in 0..8 {
                        let page_is = memory.page(page);
                        // After the end, whoever waits is let go by the closing of the userfaultfd.
                        assert!(over.load(Ordering::SeqCst) || page_is == bytes[page * PAGE..][..PAGE]);
                    }
                    memory.drop_pages(2, 1);
                    let page_is = memory.page(2);
                    assert!(over.load(Ordering::SeqCst) || page_is == vec![0; PAGE]);
                    stop.stop();
                });
                let plan = fail_nth_call(n, how);
                let served = serve(&ours, &image, &FaultService::default(), &stop);
                let seen = plan.calls_seen();
                drop(plan);
                over.store(true, Ordering::SeqCst);
                // It may still be on its way.
                drop((uffd, ours, theirs));
                guest.join().unwrap();
                let stopped = matches!(served.end, End::Stopped);
                let named = matches!(served.end, End::System(_) | End::Handshake(HandshakeError::System(_)));
                assert!(stopped || named, "call {n}, {how:?}: {:?}", served.end);
                outcomes.lock().unwrap()[usize::from(named)] += 1;
                seen
            });
            if seen < n {
                break;
            }
        }
    }
    let [got_over, named] = *outcomes.lock().unwrap();
    assert!(got_over > 10 && named > 10, "{got_over} got over, {named} named");
}

#[test]
fn a_map_error_says_what_is_wrong() {
    let error = HandshakeError::from(MapError::Count(0));
    assert_eq!(error.to_string(), "0 regions: from 1 to 256 are served");
}
