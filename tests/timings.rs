//! What a fork says of itself: every stage, round and piece of deferred work is in `tracing`, in its place, and the caller reads the same
//! numbers from the fork point.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use offshoot::backing::{AddressHole, Deferred, Mapped, PlacedRam};
use offshoot::page::{ByteSize, GuestAddress, PageSize};
use offshoot::ram::RamLayout;
use offshoot::testing::skip;
use offshoot::{
    BoxError, DeviceState, ForkError, ForkPoint, ForkTimings, Guest, LivePolicy, OnExceeded, PrecopyEnd, Relocate,
    Tree, Vm, VmName,
};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

type Fields = HashMap<&'static str, String>;

/// Everything that was noted, each with the spans around it: "fork/cut".
#[derive(Default)]
struct Log {
    spans: Vec<(String, Fields)>,
    events: Vec<(String, Fields)>,
    /// Entered on each thread, by number.
    entered: HashMap<ThreadId, Vec<usize>>,
}

/// A subscriber that keeps all.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Log>>);

struct Collect<'a>(&'a mut Fields);

impl Visit for Collect<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

impl Log {
    fn around(&self, parent: Option<&Id>, contextual: bool) -> String {
        let here = self.entered.get(&std::thread::current().id()).and_then(|stack| stack.last().copied());
        let parent = parent.map(|id| id.into_u64() as usize - 1).or(here.filter(|_| contextual));
        parent.map(|at| self.spans[at].0.clone()).unwrap_or_default()
    }
}

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("offshoot")
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut log = self.0.lock().unwrap();
        let around = log.around(span.parent(), span.is_contextual());
        let path = if around.is_empty() { "" } else { "/" };
        let mut fields = Fields::new();
        span.record(&mut Collect(&mut fields));
        log.spans.push((format!("{around}{path}{}", span.metadata().name()), fields));
        Id::from_u64(log.spans.len() as u64)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut log = self.0.lock().unwrap();
        let mut fields = Fields::new();
        event.record(&mut Collect(&mut fields));
        let around = log.around(event.parent(), event.is_contextual());
        log.events.push((around, fields));
    }

    fn enter(&self, span: &Id) {
        let at = span.into_u64() as usize - 1;
        self.0.lock().unwrap().entered.entry(std::thread::current().id()).or_default().push(at);
    }

    fn exit(&self, _: &Id) {
        self.0.lock().unwrap().entered.entry(std::thread::current().id()).or_default().pop();
    }
}

impl Recorder {
    /// What a call notes, on this thread and those that it starts.
    fn of<T>(call: impl FnOnce() -> T) -> (Self, T) {
        let recorder = Self::default();
        let result = tracing::subscriber::with_default(recorder.clone(), call);
        (recorder, result)
    }

    fn spans(&self) -> Vec<String> {
        self.0.lock().unwrap().spans.iter().map(|(path, _)| path.clone()).collect()
    }

    /// The events of one message.
    fn events(&self, message: &str) -> Vec<(String, Fields)> {
        let log = self.0.lock().unwrap();
        log.events.iter().filter(|(_, fields)| fields["message"] == message).cloned().collect()
    }

    fn event(&self, message: &str) -> (String, Fields) {
        let [event] = &self.events(message)[..] else { panic!("not one {message:?}") };
        event.clone()
    }
}

/// At rest, and fit to be moved.
struct Mover {
    refuses: bool,
}

impl Guest for Mover {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, BoxError> {
        if self.refuses { Err("refused".into()) } else { Ok(DeviceState::from_bytes([])) }
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

const LEN: ByteSize = ByteSize::mib(1);

impl Relocate for Mover {
    fn next_hole(&mut self) -> Result<AddressHole, BoxError> {
        Ok(AddressHole::pick(LEN)?)
    }

    fn relocate(&mut self, _: &PlacedRam, _: &DeviceState) -> Result<Deferred, BoxError> {
        Ok(Deferred::costly(vec![0; 100]).named("old machine"))
    }
}

fn vm() -> Vm<Mapped> {
    let layout = RamLayout::flat(LEN, PageSize::KIB_4).unwrap();
    let vm = Vm::new(&Tree::default(), VmName::new("vm").unwrap(), layout, vec![]).unwrap();
    vm.start().unwrap();
    vm
}

fn write(vm: &Vm<Mapped>, pages: u64) {
    (0..pages).for_each(|page| vm.ram().store(GuestAddress::new(page * 4096), 1 + page).unwrap());
}

fn nanoseconds(time: Duration) -> String {
    time.as_nanos().to_string()
}

/// Every stage is an event's field, with the number that the caller reads.
fn check_stages(noted: &Recorder, timings: &ForkTimings) {
    let (around, fields) = noted.event("forked");
    assert_eq!(around, "fork");
    for (name, time) in [
        ("prepare_ns", timings.prepare),
        ("pause_ns", timings.pause),
        ("save_ns", timings.save),
        ("flush_ns", timings.flush),
        ("cut_ns", timings.cut),
        ("relocate_ns", timings.relocate),
        ("resume_ns", timings.resume),
        ("stopped_ns", timings.stopped()),
        ("total_ns", timings.total),
    ] {
        assert_eq!(fields[name], nanoseconds(time), "{name}");
    }
    assert!(timings.prepare + timings.stopped() <= timings.total);
}

/// Each piece of work that was put off, by name: noted where it belongs, and told.
fn check_put_off(noted: &Recorder, point: &ForkPoint<Mapped>, names: &[&str]) {
    let took = point.teardown().wait();
    assert_eq!(point.teardown().finished(), Some(took));
    let done = point.teardown().done();
    assert_eq!(done.iter().map(|piece| piece.what).collect::<Vec<_>>(), names);
    let events = noted.events("put off, and done");
    assert_eq!(events.len(), done.len());
    for ((around, fields), piece) in events.iter().zip(&done) {
        assert_eq!((&**around, &*fields["what"]), ("fork/teardown", piece.what));
        assert_eq!(fields["took_ns"], nanoseconds(piece.took));
        assert_eq!(fields["finished_ns"], nanoseconds(piece.finished));
        assert!(piece.took <= piece.finished);
    }
    assert!(done.is_sorted_by_key(|piece| piece.finished));
}

const STAGES: [&str; 7] = ["fork", "fork/prepare", "fork/pause", "fork/save", "fork/flush", "fork/cut", "fork/resume"];

#[test]
fn a_first_fork_is_told_stage_by_stage() {
    let vm = vm();
    write(&vm, 10);
    let (noted, point) = Recorder::of(|| vm.fork(&mut Mover { refuses: false }).unwrap());
    check_stages(&noted, &point.timings());
    check_put_off(&noted, &point, &["old view"]);
    let spans = noted.spans();
    assert_eq!(spans.iter().filter(|path| !path.ends_with("teardown")).collect::<Vec<_>>(), STAGES.each_ref());
    let log = noted.0.lock().unwrap();
    assert_eq!((&*log.spans[0].1["vm"], &*log.spans[0].1["call"]), ("vm", "fork"));
}

#[test]
fn a_live_fork_is_told_round_by_round() {
    let vm = vm();
    write(&vm, 10);
    vm.fork(&mut Mover { refuses: false }).unwrap();
    for (pages, moves) in [(100, false), (40, true)] {
        write(&vm, pages);
        let policy = LivePolicy { target: offshoot::page::PageCount::ZERO, ..LivePolicy::default() };
        let mut guest = Mover { refuses: false };
        let (noted, point) = Recorder::of(|| match moves {
            false => vm.fork_live(&mut guest, &policy).unwrap(),
            true => vm.fork_live_relocating(&mut guest, &policy).unwrap(),
        });
        let timings = point.timings();
        check_stages(&noted, &timings);
        check_put_off(&noted, &point, if moves { &["old machine", "old view"] } else { &["last seal"] });
        let precopy = timings.precopy.unwrap();
        if precopy.fallback().is_some() {
            return skip(format!("no write protection here: {:?}", precopy.end));
        }
        // One round finds all, the next nothing, and so does the last.
        assert_eq!((precopy.end, precopy.rounds().len()), (PrecopyEnd::Converged, 2));
        assert_eq!(precopy.bytes(), ByteSize::kib(4 * pages));
        let rounds = noted.events("copied");
        let told = precopy.rounds().iter().chain([&precopy.last]);
        assert_eq!(rounds.len(), 3);
        for (n, ((around, fields), round)) in rounds.iter().zip(told).enumerate() {
            let within = ["fork/prepare/precopy/round", "fork/cut/last round"][n / 2];
            assert_eq!(around, within);
            let found = [&fields["pages"], &fields["bytes"], &fields["scan_ns"], &fields["copy_ns"]];
            let told = [round.pages.get().to_string(), round.bytes.get().to_string()];
            let told = [&told[0], &told[1], &nanoseconds(round.scan), &nanoseconds(round.copy)];
            assert_eq!(found, told);
        }
        let (around, fields) = noted.event("copied ahead");
        assert_eq!((&*around, &*fields["end"], &*fields["rounds"]), ("fork", "Converged", "2"));
        assert_eq!(fields["bytes"], precopy.bytes().get().to_string());
        assert_eq!(fields["total_ns"], nanoseconds(precopy.total));
        let spans = noted.spans();
        assert!(STAGES.iter().all(|stage| spans.iter().any(|path| path == stage)), "{spans:?}");
        assert_eq!(spans.iter().any(|path| path == "fork/cut/relocate"), moves);
    }
}

#[test]
fn a_fork_that_fails_says_why() {
    let vm = vm();
    let (noted, refused) = Recorder::of(|| vm.fork(&mut Mover { refuses: true }));
    assert!(matches!(refused, Err(ForkError::Save(_))));
    let (around, fields) = noted.event("not forked");
    assert_eq!((&*around, &fields["error"]), ("fork", &refused.unwrap_err().to_string()));
    assert!(noted.events("forked").is_empty());
    vm.fork(&mut Mover { refuses: false }).unwrap();
    write(&vm, 5);
    let none = LivePolicy { max_pause: Duration::ZERO, on_exceeded: OnExceeded::GiveUp, ..LivePolicy::default() };
    let (noted, refused) = Recorder::of(|| vm.fork_live(&mut Mover { refuses: false }, &none));
    assert!(matches!(refused, Err(ForkError::PauseTooLong { .. })));
    assert!(noted.event("not forked").1["error"].starts_with("the pause would last"));
}
