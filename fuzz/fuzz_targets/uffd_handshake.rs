//! The message with which a VMM tells a page-fault server where its memory lies.
//!
//! No input may panic or be held against an image that it passes the end of: what is accepted is in order, apart, whole pages, and inside, by an
//! arithmetic that cannot wrap. Every address leads into its own region's part of the image, and no other address anywhere.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot::frontend::uffd::{MemoryMap, VmmAddress};
use offshoot::page::ByteSize;

fuzz_target!(|input: &[u8]| {
    let [pages, message @ ..] = input else { return };
    let image = 4096 * u128::from(*pages);
    let Ok(map) = MemoryMap::parse(message, ByteSize::new(image as u64)) else { return };
    let regions = map.regions();
    assert!(!regions.is_empty() && regions.len() as u64 <= MemoryMap::MOST_REGIONS);
    let mut before = 0;
    let mut parts = Vec::new();
    for region in regions {
        let (base, len) = (u128::from(region.base.get()), u128::from(region.len.get()));
        let offset = u128::from(region.offset.get());
        let page = u128::from(region.page_size.bytes().get());
        assert!(len > 0 && [base, len, offset].iter().all(|number| number % page == 0));
        assert!(base >= before && base + len <= u128::from(u64::MAX) && offset + len <= image);
        before = base + len;
        parts.push((offset, offset + len));
        for within in [0, 1, len / 2, len - 1] {
            let found = map.offset_of(VmmAddress::new((base + within) as u64)).expect("inside");
            assert_eq!(u128::from(found.get()), offset + within);
        }
        let after = VmmAddress::new((base + len) as u64);
        assert!(map.offset_of(after).is_none() || regions.iter().any(|next| next.base == after));
    }
    parts.sort_unstable();
    assert!(parts.windows(2).all(|two| two[0].1 <= two[1].0), "bytes of the image are given once");
    assert!(regions[0].base.get() == 0 || map.offset_of(VmmAddress::new(regions[0].base.get() - 1)).is_none());
});
