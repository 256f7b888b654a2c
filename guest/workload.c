/* The workload: writers that never rest, one for each medium, in two processes. Each writer reads what it wrote before it writes anew, and
 * notes both in a ledger in memory, so that the ledger, memory, the page cache and the disk have one truth, and whoever holds two of them
 * from different instants holds a contradiction. */
#include "media.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PROCESSES 2
#define MESSAGE 2048

static struct ledger *ledger;
/* The agent's ends. */
static int processes[PROCESSES];

static int process_of(enum medium medium) {
    return medium >= SYNCED;
}

static void nap(void) {
    struct timespec tick = {0, 1000000};
    nanosleep(&tick, NULL);
}

static void fail(enum medium medium, uint32_t slot, const char *what) {
    uint32_t none = 0;
    if (atomic_compare_exchange_strong(&ledger->failed, &none, 1))
        snprintf(ledger->failure, sizeof ledger->failure, "%s slot %u: %s", MEDIUM_NAMES[medium], slot, what);
}

/* A slot against the ledger; NULL where they agree. */
static const char *slot_wrong(enum medium medium, uint32_t slot, enum route route) {
    static _Thread_local struct block block;
    struct entry *entry = &ledger->entries[medium][slot];
    if (memcmp(&entry->begun, &entry->done, sizeof entry->begun) != 0)
        return "the ledger itself is torn";
    int error = medium_read(medium, slot, route, &block);
    if (entry->done.seq == 0)
        return medium == NAMES && error == ENOENT ? NULL : "there, though it was removed";
    if (error)
        return strerror(error);
    if (!stamp_in_lineage(ledger, medium, entry->done))
        return "the ledger's mark is none of this lineage's";
    return block_wrong(&block, medium, slot, entry->done);
}

static struct stamp next_stamp(enum medium medium) {
    struct stamp stamp = {atomic_load(&ledger->seq[medium]) + 1, ledger->lineage[ledger->ancestors - 1].mark, 0};
    struct timespec now;
    getrandom(&stamp.nonce, sizeof stamp.nonce, 0);
    clock_gettime(CLOCK_MONOTONIC, &now);
    stamp.nonce ^= (uint64_t)now.tv_nsec << 20;
    return stamp;
}

static int write_slot(enum medium medium, uint32_t slot, int remove) {
    static _Thread_local struct block block;
    struct entry *entry = &ledger->entries[medium][slot];
    struct stamp stamp = next_stamp(medium);
    block_fill(&block, medium, slot, stamp);
    atomic_store(&ledger->seq[medium], stamp.seq);
    struct stamp none = {0, 0, 0};
    entry->begun = remove ? none : stamp;
    int error = remove ? medium_remove(medium, slot) : medium_write(medium, slot, &block);
    if (!error) {
        entry->done = entry->begun;
        atomic_store(&ledger->done[medium], stamp.seq);
    }
    return error;
}

static void wait_while_parked(enum medium medium) {
    while (atomic_load(&ledger->park)) {
        atomic_store(&ledger->parked[medium], 1);
        syscall(SYS_futex, &ledger->park, FUTEX_WAIT, 1, NULL, NULL, 0);
    }
    atomic_store(&ledger->parked[medium], 0);
}

static void *writer(void *which) {
    enum medium medium = (enum medium)(intptr_t)which;
    uint32_t random = 0x1234567u + (uint32_t)medium;
    for (;;) {
        wait_while_parked(medium);
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        uint32_t slot = medium == SYNCED ? (uint32_t)((atomic_load(&ledger->seq[medium]) + 1) % ledger->slots) : random % ledger->slots;
        const char *wrong = slot_wrong(medium, slot, AS_WRITTEN);
        if (!wrong) {
            int there = ledger->entries[medium][slot].done.seq != 0;
            int error = write_slot(medium, slot, medium == NAMES && there && (random >> 16) % 4 == 0);
            wrong = error ? strerror(error) : NULL;
        }
        if (wrong) {
            fail(medium, slot, wrong);
            /* It stands still where it was wronged, parked for good. */
            atomic_store(&ledger->parked[medium], 1);
            for (;;)
                pause();
        }
    }
    return NULL;
}

/* Every slot of this process, in one way. */
static int verify(int process, enum route route, struct text *out) {
    int wrongs = 0;
    for (enum medium medium = 0; medium < MEDIA; medium++) {
        if (process_of(medium) != process)
            continue;
        for (uint32_t slot = 0; slot < ledger->slots; slot++) {
            const char *wrong = slot_wrong(medium, slot, route);
            if (wrong && wrongs++ < 8)
                text_add(out, "%s slot %u: %s\n", MEDIUM_NAMES[medium], slot, wrong);
        }
    }
    return wrongs ? EBADMSG : 0;
}

/* Changes a block behind the ledger's back, so that a verifier can be seen to find it. */
static int spoil(enum medium medium, uint32_t slot) {
    static struct block block;
    if (medium == NAMES && ledger->entries[medium][slot].done.seq != 0)
        return medium_remove(medium, slot);
    int error = medium == NAMES ? 0 : medium_read(medium, slot, AS_WRITTEN, &block);
    block.body[7] ^= 1;
    return error ? error : medium_write(medium, slot, &block);
}

static int obey(int process, char *command, struct text *out) {
    char *rest = NULL, *word = strtok_r(command, " ", &rest);
    if (strcmp(word, "verify") == 0) {
        int status = verify(process, AS_WRITTEN, out);
        /* What was synced or written past the cache is on the disk now, not only after a sync. */
        return status || process == 0 ? status : verify(process, FROM_DISK, out);
    }
    if (strcmp(word, "unmap") == 0) {
        medium_unmap(MAPPED);
        return 0;
    }
    if (strcmp(word, "disk") == 0) {
        int status = verify(process, FROM_DISK, out);
        return status ? status : verify(process, AS_WRITTEN, out);
    }
    char *medium = strtok_r(NULL, " ", &rest);
    for (enum medium m = 0; medium && m < MEDIA; m++)
        if (strcmp(word, "spoil") == 0 && strcmp(medium, MEDIUM_NAMES[m]) == 0 && process_of(m) == process)
            return spoil(m, 3);
    return 0;
}

static void run_process(int process, int socket) {
    char bytes[MESSAGE];
    int status = 0;
    for (enum medium medium = 0; medium < MEDIA && !status; medium++) {
        if (process_of(medium) != process)
            continue;
        status = medium_open(medium, ledger->slots);
        /* The first write of each slot, in turn: write n goes to slot n modulo their number. */
        for (uint32_t n = 1; n <= ledger->slots && !status; n++)
            status = write_slot(medium, n % ledger->slots, 0);
        pthread_t thread;
        if (!status)
            status = pthread_create(&thread, NULL, writer, (void *)(intptr_t)medium);
    }
    int len = snprintf(bytes, sizeof bytes, "%d ", status);
    send(socket, bytes, (size_t)len, 0);
    for (;;) {
        ssize_t got = recv(socket, bytes, sizeof bytes - 1, 0);
        if (got <= 0)
            exit(1);
        bytes[got] = 0;
        char reply[MESSAGE - 64], message[MESSAGE];
        reply[0] = 0;
        struct text out = {reply, 0, sizeof reply, 0};
        status = obey(process, bytes, &out);
        len = snprintf(message, sizeof message, "%d %s", status, reply);
        send(socket, message, (size_t)len, 0);
    }
}

/* Has both processes do it; the first status that is not 0, and what all said. */
static int ask(const char *command, struct text *out) {
    int status = 0;
    for (int process = 0; process < PROCESSES; process++) {
        if (command && send(processes[process], command, strlen(command), MSG_NOSIGNAL) < 0)
            return errno;
        char bytes[MESSAGE];
        ssize_t got = recv(processes[process], bytes, sizeof bytes - 1, 0);
        if (got <= 0)
            return got < 0 ? errno : EPIPE;
        bytes[got] = 0;
        char *text = bytes;
        int one = (int)strtol(bytes, &text, 10);
        text_add(out, "%s", *text ? text + 1 : text);
        status = status ? status : one;
    }
    return status;
}

static int park(void) {
    atomic_store(&ledger->park, 1);
    for (int turn = 0; turn < 120000; turn++) {
        int all = 1;
        for (int medium = 0; medium < MEDIA; medium++)
            all &= atomic_load(&ledger->parked[medium]) != 0;
        if (all)
            return 0;
        nap();
    }
    return ETIMEDOUT;
}

/* Returns when all writers have left their park, so that one who parks them again waits for a write of each. */
static int go(void) {
    atomic_store(&ledger->park, 0);
    syscall(SYS_futex, &ledger->park, FUTEX_WAKE, 1 << 20, NULL, NULL, 0);
    for (int turn = 0; turn < 120000; turn++) {
        int any = 0;
        for (int medium = 0; medium < MEDIA; medium++)
            any |= atomic_load(&ledger->parked[medium]) != 0;
        if (!any || atomic_load(&ledger->failed))
            return 0;
        nap();
    }
    return ETIMEDOUT;
}

static int start(uint32_t slots, struct text *out) {
    if (ledger)
        return EALREADY;
    if (slots < 8 || slots > MAX_SLOTS)
        return EINVAL;
    void *shared = mmap(NULL, sizeof *ledger, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return errno;
    ledger = shared;
    ledger->slots = slots;
    ledger->ancestors = 1;
    for (int process = 0; process < PROCESSES; process++) {
        int ends[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
            return errno;
        pid_t child = fork();
        if (child < 0)
            return errno;
        if (child == 0) {
            prctl(PR_SET_NAME, process ? "work-sync" : "work-cache");
            run_process(process, ends[1]);
        }
        close(ends[1]);
        processes[process] = ends[0];
    }
    return ask(NULL, out);
}

/* From here on writes bear this mark. */
static int mark(uint64_t mark) {
    if (ledger->ancestors == MAX_LINEAGE)
        return ENOSPC;
    int was_parked = (int)atomic_load(&ledger->park);
    int error = park();
    if (error)
        return error;
    struct ancestor *next = &ledger->lineage[ledger->ancestors];
    next->mark = mark;
    for (int medium = 0; medium < MEDIA; medium++)
        next->first[medium] = atomic_load(&ledger->seq[medium]) + 1;
    ledger->ancestors++;
    return was_parked ? 0 : go();
}

/* After a sync and with clean caches dropped, everything is read from the disk, past the cache and through it. */
static int verify_cold(struct text *out) {
    int error = ask("unmap", out);
    if (error)
        return error;
    sync();
    error = file_write("/proc/sys/vm/drop_caches", "3", 0);
    return error ? error : ask("disk", out);
}

/* With the file system frozen nothing is left in its journal: the disk is as after an unmount. */
static int freeze(unsigned long what) {
    int fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int error = ioctl(fd, what, 0) < 0 ? errno : 0;
    close(fd);
    return error;
}

/* Per medium: writes that have returned, and blocks that bear the newest mark. */
static void status(struct text *out) {
    const struct ancestor *self = &ledger->lineage[ledger->ancestors - 1];
    text_add(out, "mark=%llx generation=%u", (unsigned long long)self->mark, ledger->ancestors - 1);
    for (int medium = 0; medium < MEDIA; medium++) {
        int own = 0;
        for (uint32_t slot = 0; slot < ledger->slots; slot++)
            own += ledger->entries[medium][slot].done.seq >= self->first[medium] && ledger->entries[medium][slot].done.seq != 0;
        text_add(out, " %s=%llu/%d", MEDIUM_NAMES[medium], (unsigned long long)atomic_load(&ledger->done[medium]), own);
    }
}

/* `work start SLOTS | park | go | mark HEX | verify | cold | status | spoil MEDIUM | freeze | thaw`. Verifying parks the writers. */
int cmd_work(int argc, char **argv, struct text *out) {
    const char *what = argc > 0 ? argv[0] : "";
    if (strcmp(what, "start") == 0)
        return argc == 2 ? start((uint32_t)atoi(argv[1]), out) : EINVAL;
    if (!ledger)
        return ESRCH;
    int error = 0;
    if (strcmp(what, "park") == 0)
        error = park();
    else if (strcmp(what, "go") == 0)
        error = go();
    else if (strcmp(what, "mark") == 0 && argc == 2)
        error = mark(strtoull(argv[1], NULL, 16));
    else if (strcmp(what, "verify") == 0 || strcmp(what, "cold") == 0) {
        error = park();
        error = error ? error : strcmp(what, "cold") == 0 ? verify_cold(out) : ask("verify", out);
    } else if (strcmp(what, "spoil") == 0 && argc == 2) {
        char command[64];
        snprintf(command, sizeof command, "spoil %.32s", argv[1]);
        error = park();
        error = error ? error : ask(command, out);
    } else if (strcmp(what, "freeze") == 0)
        error = freeze(FIFREEZE);
    else if (strcmp(what, "thaw") == 0)
        error = freeze(FITHAW);
    else if (strcmp(what, "status") != 0)
        return EINVAL;
    if (atomic_load(&ledger->failed)) {
        text_add(out, "%s\n", ledger->failure);
        return error ? error : EBADMSG;
    }
    if (!error && out->len == 0)
        status(out);
    return error;
}
