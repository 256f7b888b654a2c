/* Blocks filled and checked. */
#include "record.h"

#include <string.h>

#define MAGIC 0x6f66667368746b31ull

const char *const MEDIUM_NAMES[MEDIA] = {"anon", "mapped", "buffered", "names", "synced", "direct"};

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static uint64_t body_start(enum medium medium, uint32_t slot, struct stamp stamp) {
    return mix(stamp.seq ^ mix(stamp.mark ^ mix(stamp.nonce ^ mix((uint64_t)medium << 32 | slot))));
}

void block_fill(struct block *block, enum medium medium, uint32_t slot, struct stamp stamp) {
    block->magic = MAGIC;
    block->medium = medium;
    block->slot = slot;
    block->stamp = stamp;
    uint64_t word = body_start(medium, slot, stamp);
    for (size_t i = 0; i < sizeof block->body / 8; i++)
        block->body[i] = word += 0x9e3779b97f4a7c15ull ^ (word << 7);
}

int block_whole(const struct block *block, enum medium medium, uint32_t slot) {
    if (block->magic != MAGIC || block->medium != medium || block->slot != slot)
        return 0;
    uint64_t word = body_start(medium, slot, block->stamp);
    for (size_t i = 0; i < sizeof block->body / 8; i++)
        if (block->body[i] != (word += 0x9e3779b97f4a7c15ull ^ (word << 7)))
            return 0;
    return 1;
}

const char *block_wrong(const struct block *block, enum medium medium, uint32_t slot, struct stamp stamp) {
    if (!block_whole(block, medium, slot))
        return "torn or foreign";
    if (block->stamp.seq < stamp.seq)
        return "older than RAM says";
    if (block->stamp.seq > stamp.seq)
        return "newer than RAM says";
    if (block->stamp.mark != stamp.mark || block->stamp.nonce != stamp.nonce)
        return "of another history";
    return NULL;
}

int stamp_in_lineage(const struct ledger *ledger, enum medium medium, struct stamp stamp) {
    for (uint32_t i = ledger->ancestors; i-- > 0;)
        if (stamp.seq >= ledger->lineage[i].first[medium])
            return stamp.mark == ledger->lineage[i].mark;
    return 0;
}
