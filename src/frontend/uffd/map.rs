//! Where a VMM's memory lies: regions of its address space, each with its place in the image.
//!
//! Everything here was said by another process. It is checked once, by [`MemoryMap::parse`]; what is found by it then lies inside the image.

use serde::Deserialize;

use crate::page::{ByteOffset, ByteSize, GeometryError, PageCount, PageIndex, PageRange, PageSize};
use crate::sys::foreign_uffd::VmmAddress;

/// The unit in which faults are kept: pages of 4 KiB, whatever larger pages a region is made of.
pub(super) const PAGE: PageSize = PageSize::KIB_4;

/// What is wrong with a hand-shake's message.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// Not the JSON that was expected.
    #[error("not a list of regions: {0}")]
    Json(String),
    /// None, or more than anybody needs.
    #[error("{0} regions: from 1 to {limit} are served", limit = MemoryMap::MOST_REGIONS)]
    Count(u64),
    /// Neither 4 KiB nor a larger power of two, up to 2 MiB.
    #[error(transparent)]
    PageSize(#[from] GeometryError),
    /// `page_size` and `page_size_kib`, which both are in bytes, contradict each other.
    #[error("page_size is {0}, page_size_kib {1}: both are in bytes, and must be the same")]
    TwoPageSizes(ByteSize, ByteSize),
    /// Address, size or offset are not whole pages, or there are none.
    #[error("a region of {len} at {base:?} from offset {offset} is not whole pages of {page}")]
    Misaligned {
        /// Where it lies in the VMM.
        base: VmmAddress,
        /// How long it is.
        len: ByteSize,
        /// Where its bytes are in the image.
        offset: ByteOffset,
        /// Its pages.
        page: ByteSize,
    },
    /// It passes the end of the image, or of all addresses.
    #[error("a region of {len} from offset {offset} passes the end of an image of {image}")]
    PastTheEnd {
        /// How long the region is.
        len: ByteSize,
        /// Where its bytes are in the image.
        offset: ByteOffset,
        /// How long the image is.
        image: ByteSize,
    },
    /// Two regions share addresses, or bytes of the image.
    #[error("regions at {0:?} and {1:?} overlap, in addresses or in the image")]
    Overlap(VmmAddress, VmmAddress),
}

/// One region, as a VMM tells of it.
#[derive(Deserialize)]
struct Told {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// One region of a VMM's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryRegion {
    /// Its first address.
    pub base: VmmAddress,
    /// Its length: whole pages.
    pub len: ByteSize,
    /// Where its bytes begin in the image.
    pub offset: ByteOffset,
    /// What it is mapped in.
    pub page_size: PageSize,
}

/// Where a VMM's memory lies. Ascending, without overlaps, inside the image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryMap {
    regions: Vec<MemoryRegion>,
}

/// A page of a region.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Place {
    pub(super) region: usize,
    pub(super) page: PageIndex,
}

impl MemoryMap {
    /// The most regions of one VMM.
    pub const MOST_REGIONS: u64 = 256;

    /// Reads a hand-shake's message: a JSON list of regions, with `base_host_virt_addr`, `size`, `offset` and, since Firecracker 1.7 or so,
    /// `page_size_kib` or `page_size`, both in bytes. Other fields are ignored.
    ///
    /// # Errors
    /// [`MapError`].
    ///
    /// ```
    /// use offshoot::frontend::uffd::{MapError, MemoryMap, VmmAddress};
    /// use offshoot::page::{ByteOffset, ByteSize};
    /// let told = br#"[{"base_host_virt_addr": 65536, "size": 8192, "offset": 4096, "page_size": 4096}]"#;
    /// let map = MemoryMap::parse(told, ByteSize::kib(12))?;
    /// assert_eq!(map.offset_of(VmmAddress::new(65536 + 5000)), Some(ByteOffset::new(4096 + 5000)));
    /// assert_eq!(map.offset_of(VmmAddress::new(65536 + 8192)), None);
    /// assert!(matches!(MemoryMap::parse(told, ByteSize::kib(8)), Err(MapError::PastTheEnd { .. })));
    /// # Ok::<(), MapError>(())
    /// ```
    pub fn parse(message: &[u8], image: ByteSize) -> Result<Self, MapError> {
        let mut rest = message;
        let map = Self::from_reader(&mut rest, image)?;
        if rest.iter().all(u8::is_ascii_whitespace) {
            Ok(map)
        } else {
            Err(MapError::Json("more than one list".into()))
        }
    }

    /// The same from a stream, of which it takes no byte after the list.
    pub(super) fn from_reader(reader: impl std::io::Read, image: ByteSize) -> Result<Self, MapError> {
        let mut json = serde_json::Deserializer::from_reader(reader);
        let told = Vec::<Told>::deserialize(&mut json).map_err(|error| MapError::Json(error.to_string()))?;
        let count = told.len() as u64;
        if count == 0 || count > Self::MOST_REGIONS {
            return Err(MapError::Count(count));
        }
        let regions = told.iter().map(|told| told.check(image)).collect::<Result<Vec<_>, _>>()?;
        let mut by_offset = regions.clone();
        by_offset.sort_by_key(|region| region.offset);
        for two in by_offset.windows(2) {
            if two[0].offset.get() + two[0].len.get() > two[1].offset.get() {
                return Err(MapError::Overlap(two[0].base, two[1].base));
            }
        }
        let mut regions = regions;
        regions.sort_by_key(|region| region.base);
        match regions.windows(2).find(|two| two[0].end() > two[1].base.get()) {
            Some(two) => Err(MapError::Overlap(two[0].base, two[1].base)),
            None => Ok(Self { regions }),
        }
    }

    /// The regions in ascending order of addresses.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Where in the image the byte at an address is; `None` outside all regions.
    pub fn offset_of(&self, at: VmmAddress) -> Option<ByteOffset> {
        let region = self.regions[self.region_of(at)?];
        Some(ByteOffset::new(region.offset.get() + (at.get() - region.base.get())))
    }

    fn region_of(&self, at: VmmAddress) -> Option<usize> {
        let after = self.regions.partition_point(|region| region.base <= at);
        let found = after.checked_sub(1)?;
        (at.get() < self.regions[found].end()).then_some(found)
    }

    /// The page of an address.
    pub(super) fn place_of(&self, at: VmmAddress) -> Option<Place> {
        let region = self.region_of(at)?;
        let within = at.get() - self.regions[region].base.get();
        Some(Place { region, page: PAGE.page_of(ByteOffset::new(within)) })
    }

    /// The pages that lie in a range of addresses, wholly or in part, by region.
    pub(super) fn pages_in(&self, start: VmmAddress, end: VmmAddress) -> impl Iterator<Item = (usize, PageRange)> + '_ {
        let first = self.regions.partition_point(|region| region.end() <= start.get());
        let meeting = self.regions[first..].iter().take_while(move |region| region.base < end);
        meeting.enumerate().map(move |(at, region)| {
            let page = |address: u64| address.saturating_sub(region.base.get()).min(region.len.get());
            let (from, to) = (page(start.get()) >> PAGE.shift(), page(end.get()).div_ceil(PAGE.bytes().get()));
            (first + at, PageRange::from_bounds(PageIndex::new(from), PageIndex::new(to.max(from))))
        })
    }
}

impl MemoryRegion {
    /// The address after the last. Cannot overflow: checked when it was told.
    fn end(&self) -> u64 {
        self.base.get() + self.len.get()
    }

    pub(super) fn pages(&self) -> PageCount {
        PageCount::new(self.len.get() >> PAGE.shift())
    }

    pub(super) fn address_of(&self, page: PageIndex) -> VmmAddress {
        VmmAddress::new(self.base.get() + PAGE.start_of(page).get())
    }

    pub(super) fn image_offset_of(&self, page: PageIndex) -> ByteOffset {
        ByteOffset::new(self.offset.get() + PAGE.start_of(page).get())
    }

    /// The pages that are put together with one: those of its page, or of `window` where that is larger.
    pub(super) fn around(&self, page: PageIndex, window: PageCount) -> PageRange {
        let unit = window.get().max(self.page_size.bytes().get() >> PAGE.shift());
        let start = page.get() - page.get() % unit;
        PageRange::from_bounds(PageIndex::new(start), PageIndex::new((start + unit).min(self.pages().get())))
    }
}

impl Told {
    fn check(&self, image: ByteSize) -> Result<MemoryRegion, MapError> {
        let (base, len) = (VmmAddress::new(self.base_host_virt_addr), ByteSize::new(self.size));
        let offset = ByteOffset::new(self.offset);
        let page = match (self.page_size, self.page_size_kib) {
            (Some(one), Some(other)) if one != other => {
                return Err(MapError::TwoPageSizes(ByteSize::new(one), ByteSize::new(other)));
            }
            (Some(bytes), _) | (None, Some(bytes)) => ByteSize::new(bytes),
            (None, None) => PAGE.bytes(),
        };
        let page_size = PageSize::new(page)?;
        if len == ByteSize::ZERO || [base.get(), len.get(), offset.get()].iter().any(|n| !n.is_multiple_of(page.get()))
        {
            return Err(MapError::Misaligned { base, len, offset, page });
        }
        let inside = offset.checked_add(len).is_some_and(|end| end.get() <= image.get());
        if !inside || base.get().checked_add(len.get()).is_none() {
            return Err(MapError::PastTheEnd { len, offset, image });
        }
        Ok(MemoryRegion { base, len, offset, page_size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<MemoryMap, MapError> {
        MemoryMap::parse(text.as_bytes(), ByteSize::mib(8))
    }

    fn region(base: u64, size: u64, offset: u64, more: &str) -> String {
        format!(r#"{{"base_host_virt_addr":{base},"size":{size},"offset":{offset}{more}}}"#)
    }

    #[test]
    fn every_version_of_the_message_is_read() {
        for more in ["", r#","page_size_kib":4096"#, r#","page_size":4096,"page_size_kib":4096,"new":[{}]"#] {
            let map =
                parse(&format!("[{},{}]\n", region(0x20000, 8192, 4096, more), region(0x8000, 4096, 0, more))).unwrap();
            assert_eq!(map.regions()[0].base, VmmAddress::new(0x8000));
            assert_eq!(map.offset_of(VmmAddress::new(0x8fff)), Some(ByteOffset::new(0xfff)));
            assert_eq!(map.offset_of(VmmAddress::new(0x9000)), None);
            assert_eq!(map.offset_of(VmmAddress::new(0x21000)), Some(ByteOffset::new(8192)));
            assert_eq!(map.offset_of(VmmAddress::new(u64::MAX)), None);
        }
        let huge = parse(&format!("[{}]", region(2 << 20, 4 << 20, 0, r#","page_size":2097152"#))).unwrap();
        let around = huge.regions()[0].around(PageIndex::new(700), PageCount::new(1));
        assert_eq!((around.start().get(), around.end().get()), (512, 1024));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let one = |base, size, offset, more| parse(&format!("[{}]", region(base, size, offset, more)));
        for text in ["", "[", "{}", "[1]", "[{}]", "[] []", r#"[{"size":-1}]"#, "\u{1}", &"[".repeat(5000)] {
            assert!(matches!(parse(text), Err(MapError::Json(_) | MapError::Count(_))), "{text}");
        }
        assert_eq!(parse("[]"), Err(MapError::Count(0)));
        let many: Vec<_> = (0..300).map(|n| region(n * 4096, 4096, n * 4096, "")).collect();
        assert_eq!(parse(&format!("[{}]", many.join(","))), Err(MapError::Count(300)));
        assert!(matches!(one(0, 4096, 0, r#","page_size":4"#), Err(MapError::PageSize(_))));
        assert!(matches!(one(0, 4096, 0, r#","page_size":0"#), Err(MapError::PageSize(_))));
        assert!(matches!(
            one(0, 4096, 0, r#","page_size":4096,"page_size_kib":8192"#),
            Err(MapError::TwoPageSizes(..))
        ));
        for (base, size, offset) in [(1, 4096, 0), (0, 4095, 0), (0, 0, 0), (0, 4096, 5)] {
            assert!(matches!(one(base, size, offset, ""), Err(MapError::Misaligned { .. })));
        }
        for (base, size, offset) in
            [(0, 9 << 20, 0), (0, 4096, 8 << 20), (0, 4096, !4095), (!4095, 8192, 0), (0, !4095, 4096)]
        {
            assert!(matches!(one(base, size, offset, ""), Err(MapError::PastTheEnd { .. })), "{base} {size} {offset}");
        }
        for (base, offset) in [(4096, 16384), (16384, 4096)] {
            let two = format!("[{},{}]", region(0, 8192, 0, ""), region(base, 8192, offset, ""));
            assert!(matches!(parse(&two), Err(MapError::Overlap(..))));
        }
    }

    #[test]
    fn ranges_of_addresses_meet_the_pages_of_each_region() {
        let map =
            parse(&format!("[{},{}]", region(0x1000, 0x2000, 0, ""), region(0x5000, 0x3000, 0x2000, ""))).unwrap();
        let pages = |start, end| -> Vec<_> {
            let found = map.pages_in(VmmAddress::new(start), VmmAddress::new(end));
            found.map(|(region, pages)| (region, pages.start().get(), pages.end().get())).collect()
        };
        assert_eq!(pages(0, u64::MAX), [(0, 0, 2), (1, 0, 3)]);
        assert_eq!(pages(0x2800, 0x5001), [(0, 1, 2), (1, 0, 1)]);
        assert_eq!(pages(0x6000, 0x7000), [(1, 1, 2)]);
        assert_eq!(pages(0x3000, 0x5000), []);
        assert_eq!(pages(0x7000, 0x1000), []);
    }
}
