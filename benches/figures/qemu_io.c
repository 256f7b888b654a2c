/* io DEVICE read|write REQUESTS WORKERS: random requests of 4 KiB, past the guest's page cache and past the first MiB; prints ns per request. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define FIRST 256

static int work(int device, int writes, long requests, uint64_t blocks, uint64_t seed) {
    static char block[BLOCK] __attribute__((aligned(BLOCK)));
    for (int i = 0; i < BLOCK; i++)
        block[i] = (char)(seed + (uint64_t)i);
    for (long i = 0; i < requests; i++) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        off_t at = (off_t)((FIRST + seed % (blocks - FIRST)) * BLOCK);
        if ((writes ? pwrite(device, block, BLOCK, at) : pread(device, block, BLOCK, at)) != BLOCK) {
            perror("request");
            return 1;
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 5)
        return 2;
    int device = open(argv[1], O_RDWR | O_DIRECT), writes = argv[2][0] == 'w', workers = atoi(argv[4]), failed = 0;
    long requests = atol(argv[3]);
    off_t len = lseek(device, 0, SEEK_END);
    if (device < 0 || len <= FIRST * BLOCK || requests < 1 || workers < 1) {
        perror(argv[1]);
        return 1;
    }
    struct timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    for (int worker = 0; worker < workers; worker++) {
        pid_t child = fork();
        if (child < 0)
            return 1;
        if (child == 0)
            _exit(work(device, writes, requests / workers, (uint64_t)len / BLOCK, (uint64_t)begun.tv_nsec * 2654435761u + (uint64_t)worker * 7919 + 1));
    }
    for (int worker = 0, status; worker < workers; worker++)
        if (wait(&status) < 0 || status != 0)
            failed = 1;
    clock_gettime(CLOCK_MONOTONIC, &ended);
    double ns = (double)(ended.tv_sec - begun.tv_sec) * 1e9 + (double)(ended.tv_nsec - begun.tv_nsec);
    printf("%.0f\n", ns / (double)(requests / workers * workers));
    return failed;
}
