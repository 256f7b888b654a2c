/* What the parts of the guest's one program share. The program is process 1 of the initramfs and of the root disk, the agent on the
 * virtio-serial port and the workload, told apart by process 1 being process 1 and by the first argument. */
#ifndef GUEST_H
#define GUEST_H

#include <stddef.h>
#include <stdint.h>

/* The longest line of the agent's protocol, both ways, with its line feed. */
#define LINE_MAX_BYTES 65536

/* Text that grows up to a bound; what does not fit is left out, and `full` says so. */
struct text {
    char *bytes;
    size_t len, room;
    int full;
};

void text_add(struct text *text, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Process 1: `init.c`. Does not return. */
void run_init(void);

/* The agent: `agent.c`. Does not return. */
void run_agent(void);

/* What makes a clone its own: `identity.c`. Each takes its arguments and appends its answer; 0 or an errno. */
int cmd_hostname(int argc, char **argv, struct text *out);
int cmd_machine_id(int argc, char **argv, struct text *out);
int cmd_net(int argc, char **argv, struct text *out);
int cmd_clock(int argc, char **argv, struct text *out);
int cmd_random(int argc, char **argv, struct text *out);
int cmd_prng(int argc, char **argv, struct text *out);
int cmd_klog(int argc, char **argv, struct text *out);
int cmd_reseeds(int argc, char **argv, struct text *out);

/* Whole files: `files.c`. 0 or an errno. */
int file_write(const char *path, const char *text, int flags);
int file_read(const char *path, char *text, size_t room);

/* The workload: `workload.c` runs it in processes of its own and answers the agent's `work` command. */
int cmd_work(int argc, char **argv, struct text *out);

/* For the host, of a file taken from a clone's disk: `check.c`. */
int run_check(int argc, char **argv);

#endif
