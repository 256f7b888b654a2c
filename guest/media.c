/* Memory, mapped and buffered files, directories, synced and direct writes. A medium is used by one writer, or by the verifier while
 * that is parked. */
#include "media.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int fds[MEDIA];
static void *maps[MEDIA];
static uint32_t count;
static int names_fd;

static void name_of(char *name, size_t room, const char *kind, uint32_t slot) {
    snprintf(name, room, "%s-%u", kind, slot);
}

static int map_file(enum medium medium) {
    maps[medium] = mmap(NULL, (size_t)count * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, fds[medium], 0);
    if (maps[medium] != MAP_FAILED)
        return 0;
    maps[medium] = NULL;
    return errno;
}

int medium_open(enum medium medium, uint32_t slots) {
    count = slots;
    if (medium == ANON) {
        maps[ANON] = mmap(NULL, (size_t)slots * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return maps[ANON] == MAP_FAILED ? errno : 0;
    }
    mkdir("/work", 0755);
    if (medium == NAMES) {
        mkdir("/work/names", 0755);
        names_fd = open("/work/names", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        return names_fd < 0 ? errno : 0;
    }
    char path[64];
    snprintf(path, sizeof path, "/work/%s", MEDIUM_NAMES[medium]);
    fds[medium] = open(path, O_RDWR | O_CREAT | O_CLOEXEC | (medium == DIRECT ? O_DIRECT : 0), 0644);
    if (fds[medium] < 0)
        return errno;
    if (ftruncate(fds[medium], (off_t)slots * BLOCK) < 0)
        return errno;
    return medium == MAPPED ? map_file(medium) : 0;
}

void medium_unmap(enum medium medium) {
    if (medium == MAPPED && maps[medium]) {
        munmap(maps[medium], (size_t)count * BLOCK);
        maps[medium] = NULL;
    }
}

static int whole_write(int fd, const void *bytes, off_t at) {
    ssize_t wrote = pwrite(fd, bytes, BLOCK, at);
    return wrote == BLOCK ? 0 : wrote < 0 ? errno : EIO;
}

/* Direct transfers ask for aligned memory. Each thread has its own. */
static _Thread_local struct block aligned __attribute__((aligned(BLOCK)));

int medium_write(enum medium medium, uint32_t slot, const struct block *block) {
    off_t at = (off_t)slot * BLOCK;
    switch (medium) {
    case ANON:
    case MAPPED:
        if (!maps[medium]) {
            int error = map_file(medium);
            if (error)
                return error;
        }
        memcpy((char *)maps[medium] + at, block, BLOCK);
        return 0;
    case NAMES: {
        char new[32], name[32];
        name_of(new, sizeof new, "new", slot);
        name_of(name, sizeof name, "n", slot);
        int fd = openat(names_fd, new, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        if (fd < 0)
            return errno;
        int error = whole_write(fd, block, 0);
        close(fd);
        if (!error && renameat(names_fd, new, names_fd, name) < 0)
            error = errno;
        return error;
    }
    case DIRECT:
        memcpy(&aligned, block, BLOCK);
        return whole_write(fds[medium], &aligned, at);
    case SYNCED: {
        int error = whole_write(fds[medium], block, at);
        return error ? error : fdatasync(fds[medium]) < 0 ? errno : 0;
    }
    default:
        return whole_write(fds[medium], block, at);
    }
}

static int read_path(int dir, const char *path, off_t at, int flags, struct block *block) {
    int fd = openat(dir, path, O_RDONLY | O_CLOEXEC | flags);
    if (fd < 0)
        return errno;
    ssize_t got = pread(fd, &aligned, BLOCK, at);
    int error = got == BLOCK ? 0 : got < 0 ? errno : EIO;
    close(fd);
    memcpy(block, &aligned, BLOCK);
    return error;
}

int medium_read(enum medium medium, uint32_t slot, enum route route, struct block *block) {
    off_t at = (off_t)slot * BLOCK;
    int flags = route == FROM_DISK ? O_DIRECT : 0;
    if (medium == ANON || (medium == MAPPED && route == AS_WRITTEN)) {
        if (!maps[medium]) {
            int error = map_file(medium);
            if (error)
                return error;
        }
        memcpy(block, (char *)maps[medium] + at, BLOCK);
        return 0;
    }
    if (medium == NAMES) {
        char name[32];
        name_of(name, sizeof name, "n", slot);
        return read_path(names_fd, name, 0, flags, block);
    }
    if (route == FROM_DISK) {
        char path[64];
        snprintf(path, sizeof path, "/work/%s", MEDIUM_NAMES[medium]);
        return read_path(AT_FDCWD, path, at, flags, block);
    }
    ssize_t got = pread(fds[medium], &aligned, BLOCK, at);
    memcpy(block, &aligned, BLOCK);
    return got == BLOCK ? 0 : got < 0 ? errno : EIO;
}

int medium_remove(enum medium medium, uint32_t slot) {
    char name[32];
    name_of(name, sizeof name, "n", slot);
    if (medium != NAMES)
        return EINVAL;
    return unlinkat(names_fd, name, 0) < 0 ? errno : 0;
}
