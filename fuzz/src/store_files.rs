//! A clone store in memory whose catalogue says anything at all: what the fuzz target of the catalogue opens.

use std::sync::Arc;
use std::sync::OnceLock;

use offshoot::page::{ByteOffset, ByteSize};
use offshoot::store::{CloneName, CloneStore, Job, Medium, Sharing, StoreOptions};
use offshoot::testing::ByteSource;
use offshoot::testing::crash::Recorder;
use redb::{Database, StorageBackend, TableDefinition};

/// The catalogue's file.
pub const CATALOGUE: &str = "catalogue.redb";

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const CLONES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("clones");
const LAYERS: TableDefinition<'_, [u8; 16], &[u8]> = TableDefinition::new("layers");
const REMOVALS: TableDefinition<'_, &str, ()> = TableDefinition::new("removals");

/// The files of a small store: an image, a clone of it that was written, and one that was not.
fn files() -> &'static [(String, Vec<u8>)] {
    static FILES: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    FILES.get_or_init(|| {
        let recorder = Recorder::new();
        let store = CloneStore::over(recorder.folder(), StoreOptions::default()).expect("an empty folder");
        let [golden, web, idle] = ["golden", "web", "idle"].map(|name| CloneName::new(name).expect("a good name"));
        store.create_image(&golden, &ByteSource::new(vec![7; 3 * 4096]), &Job::new()).expect("there is room");
        store.clone_disk(&golden, &web).expect("it is there");
        store.clone_disk(&golden, &idle).expect("it is there");
        let disk = store.open_disk(&web).expect("it is there");
        offshoot::backing::Backing::write(&disk, ByteOffset::new(4096), &[9; 512]).expect("there is room");
        offshoot::backing::Backing::flush(&disk).expect("nothing fails");
        drop((disk, store));
        let names = recorder.folder().names().expect("they are there");
        names.into_iter().map(|name| (name.clone(), recorder.content(&name).expect("it is there"))).collect()
    })
}

fn folder(catalogue: impl Fn(&mut Vec<u8>)) -> Recorder {
    let recorder = Recorder::new();
    for (name, bytes) in files() {
        let mut bytes = bytes.clone();
        if name == CATALOGUE {
            catalogue(&mut bytes);
        }
        recorder.place(name, &bytes);
    }
    recorder
}

/// The store with bytes of its catalogue's file changed: where (24 bits), how many (8 bits), the bytes.
pub fn patched(patches: &[u8]) -> Recorder {
    folder(|file| {
        let mut patches = patches;
        while let [a, b, c, len, rest @ ..] = patches {
            let (bytes, after) = rest.split_at(usize::from(*len).min(rest.len()));
            let at = u32::from_le_bytes([*a, *b, *c, 0]) as usize % file.len();
            let here = bytes.len().min(file.len() - at);
            file[at..at + here].copy_from_slice(&bytes[..here]);
            patches = after;
        }
    })
}

/// The store with rows changed behind its back: which table (the first two bits of a byte; the others are a key), how many bytes (8 bits), the bytes.
/// In the tables of records a row that is there has the bytes laid over it from wherever the first one says, so that most of it stays as it was.
pub fn with_rows(rows: &[u8]) -> Recorder {
    let recorder = folder(|_| {});
    let medium = recorder.folder().open(CATALOGUE, Sharing::Alone).expect("it is there");
    let database = Database::builder().create_with_file_format_v3(true).create_with_backend(Backend(medium));
    let write = database.as_ref().expect("it is whole").begin_write().expect("nobody else is at it");
    let mut rows = rows;
    while let [kind, len, rest @ ..] = rows {
        let (bytes, after) = rest.split_at(usize::from(*len).min(rest.len()));
        change(&write, kind & 3, usize::from(kind >> 2), bytes);
        rows = after;
    }
    write.commit().expect("nothing fails");
    drop(database);
    recorder
}

fn change(write: &redb::WriteTransaction, table: u8, key: usize, bytes: &[u8]) {
    use redb::ReadableTable;
    let text = String::from_utf8_lossy(bytes).into_owned();
    let told = "nothing fails";
    match table {
        0 => {
            let mut clones = write.open_table(CLONES).expect(told);
            let names: Vec<String> =
                clones.iter().expect(told).map(|row| row.expect(told).0.value().to_owned()).collect();
            match names.get(key % (names.len() + 2)) {
                Some(name) => {
                    let old = clones.get(name.as_str()).expect(told).expect("it was listed").value().to_vec();
                    clones.insert(name.as_str(), laid_over(old, bytes).as_slice()).expect(told);
                }
                None => drop(clones.insert(format!("name {key}").as_str(), bytes).expect(told)),
            }
        }
        1 => {
            let mut layers = write.open_table(LAYERS).expect(told);
            let ids: Vec<[u8; 16]> = layers.iter().expect(told).map(|row| row.expect(told).0.value()).collect();
            match ids.get(key % (ids.len() + 1)) {
                Some(id) => {
                    let old = layers.get(id).expect(told).expect("it was listed").value().to_vec();
                    layers.insert(id, laid_over(old, bytes).as_slice()).expect(told);
                }
                None => drop(layers.insert([key as u8; 16], bytes).expect(told)),
            }
        }
        2 => drop(write.open_table(REMOVALS).expect(told).insert(text.as_str(), ()).expect(told)),
        _ => {
            let mut word = [0; 8];
            word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            let name = ["version", "features", "features-read-only", "other"][key % 4];
            write.open_table(META).expect(told).insert(name, u64::from_le_bytes(word)).expect(told);
        }
    }
}

/// A row with bytes changed from wherever the first says; a whole new one where that is past its end.
fn laid_over(mut old: Vec<u8>, bytes: &[u8]) -> Vec<u8> {
    let Some((at, bytes)) = bytes.split_first() else { return Vec::new() };
    let at = usize::from(*at);
    if at + bytes.len() > old.len() {
        return bytes.to_vec();
    }
    old[at..at + bytes.len()].copy_from_slice(bytes);
    old
}

#[derive(Debug)]
struct Backend(Arc<dyn Medium>);

impl StorageBackend for Backend {
    fn len(&self) -> std::io::Result<u64> {
        self.0.len().map(ByteSize::get)
    }

    fn read(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.0.read_at(ByteOffset::new(offset), &mut bytes)?;
        Ok(bytes)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.0.set_len(ByteSize::new(len))
    }

    fn sync_data(&self, _eventual: bool) -> std::io::Result<()> {
        self.0.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.0.write_at(ByteOffset::new(offset), data)
    }
}
