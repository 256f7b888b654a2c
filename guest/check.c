/* For the host: the file of the medium whose every write was synced, taken from a disk that was cut off in the middle of everything.
 * Its slots were written in turn, so the newest block says what each other slot must hold: all that had been synced, and nothing else. */
#include "record.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int run_check(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "check FILE SLOTS FLOOR\n");
        return 2;
    }
    uint64_t slots = strtoull(argv[1], NULL, 10), floor = strtoull(argv[2], NULL, 10), newest = 0;
    int fd = open(argv[0], O_RDONLY | O_CLOEXEC);
    if (fd < 0 || slots == 0 || slots > MAX_SLOTS) {
        perror(argv[0]);
        return 2;
    }
    static uint64_t seqs[MAX_SLOTS];
    for (uint32_t slot = 0; slot < slots; slot++) {
        struct block block;
        if (pread(fd, &block, BLOCK, (off_t)slot * BLOCK) != BLOCK || !block_whole(&block, SYNCED, slot)) {
            printf("slot %u is torn\n", slot);
            return 1;
        }
        seqs[slot] = block.stamp.seq;
        if (seqs[slot] > newest)
            newest = seqs[slot];
    }
    for (uint64_t slot = 0; slot < slots; slot++) {
        uint64_t due = newest - (newest + slots - slot) % slots;
        if (seqs[slot] != due) {
            printf("slot %llu holds write %llu, not %llu\n", (unsigned long long)slot, (unsigned long long)seqs[slot],
                   (unsigned long long)due);
            return 1;
        }
    }
    if (newest < floor) {
        printf("the newest write is %llu, but %llu was synced\n", (unsigned long long)newest, (unsigned long long)floor);
        return 1;
    }
    printf("%llu\n", (unsigned long long)newest);
    return 0;
}
