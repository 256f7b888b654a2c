/* The workload's record: what a block holds, what the ledger in RAM says of it, and who wrote it. */
#ifndef RECORD_H
#define RECORD_H

#include <stdatomic.h>
#include <stdint.h>

#include "guest.h"

#define BLOCK 4096
#define MAX_SLOTS 1024
#define MAX_LINEAGE 16

/* Where blocks are kept. The first four belong to one process, the last two to another. */
enum medium {
    ANON,     /* private anonymous memory */
    MAPPED,   /* a file written through a shared mapping, never synced by us */
    BUFFERED, /* a file written by calls, never synced by us */
    NAMES,    /* a file of its own for each block: made, renamed over its predecessor, unlinked */
    SYNCED,   /* a file written by calls, each followed by fdatasync; slots in turn */
    DIRECT,   /* a file written past the page cache */
    MEDIA
};

extern const char *const MEDIUM_NAMES[MEDIA];

/* One write: its number among the medium's, who wrote it, and a number nobody else draws. All zero: nothing was written. */
struct stamp {
    uint64_t seq, mark, nonce;
};

/* The body follows from the stamp, so that a block says by itself whether it is whole. */
struct block {
    uint64_t magic;
    uint32_t medium, slot;
    struct stamp stamp;
    uint64_t body[(BLOCK - 40) / 8];
};

/* RAM's idea of a slot. They differ while the write is on its way. */
struct entry {
    struct stamp begun, done;
};

/* From this number on, each medium's writes bear this mark. */
struct ancestor {
    uint64_t mark;
    uint64_t first[MEDIA];
};

/* Shared by the agent and the workload's processes. */
struct ledger {
    _Atomic uint32_t park;          /* writers stop before their next write: a futex */
    _Atomic uint32_t parked[MEDIA];
    _Atomic uint64_t seq[MEDIA];    /* the last write that was begun */
    _Atomic uint64_t done[MEDIA];   /* the last write that has returned */
    _Atomic uint32_t failed;
    char failure[200];              /* of the first writer that read what it had not written */
    uint32_t slots, ancestors;
    struct ancestor lineage[MAX_LINEAGE];
    struct entry entries[MEDIA][MAX_SLOTS];
};

void block_fill(struct block *block, enum medium medium, uint32_t slot, struct stamp stamp);

/* What is wrong with a block that the ledger says bears this stamp, or NULL. */
const char *block_wrong(const struct block *block, enum medium medium, uint32_t slot, struct stamp stamp);

/* Whether a block is whole, whatever its stamp. */
int block_whole(const struct block *block, enum medium medium, uint32_t slot);

/* Whether this lineage can have written it. */
int stamp_in_lineage(const struct ledger *ledger, enum medium medium, struct stamp stamp);

#endif
