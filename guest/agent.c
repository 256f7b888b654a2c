/* The agent: reads requests from the virtio-serial port, one line each, and answers each with one line.
 *
 *     request: ID COMMAND [WORD ...]        reply: ID STATUS OUTPUT
 *
 * STATUS is 0 or an errno (for `run`: the exit status). In words and output `\\`, `\n`, `\s` (a space) and `\xHH` stand for what would
 * end a line or a word. A line that is empty or no request is passed over: a clone's port may begin in the middle of its parent's line. */
#include "guest.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PORT_NAME "org.offshoot.agent"
#define MAX_WORDS 32
#define OUTPUT_ROOM 30000
/* A client's first byte: what there is of a line was begun by another, perhaps in the parent. */
#define CANCEL 0x18

static void ready_line(const char *how) {
    dprintf(2, "offshoot-guest ready: %s\n", how);
}

static int open_port(void) {
    DIR *ports = opendir("/sys/class/virtio-ports");
    if (!ports)
        return -1;
    struct dirent *entry;
    int fd = -1;
    while (fd < 0 && (entry = readdir(ports))) {
        char path[300], name[128];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%.200s/name", entry->d_name);
        if (file_read(path, name, sizeof name) != 0 || strcmp(name, PORT_NAME) != 0)
            continue;
        snprintf(path, sizeof path, "/dev/%.200s", entry->d_name);
        fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    }
    closedir(ports);
    return fd;
}

/* Undoes the escapes in place. */
static void unescape(char *word) {
    char *to = word;
    for (char *from = word; *from; from++) {
        if (*from != '\\' || !from[1]) {
            *to++ = *from;
            continue;
        }
        from++;
        unsigned byte;
        if (*from == 'n')
            *to++ = '\n';
        else if (*from == 's')
            *to++ = ' ';
        else if (*from == 'x' && from[1] && from[2] && sscanf(from + 1, "%2x", &byte) == 1) {
            *to++ = (char)byte;
            from += 2;
        } else
            *to++ = *from;
    }
    *to = 0;
}

static void add_escaped(struct text *line, const struct text *output) {
    for (size_t i = 0; i < output->len && !line->full; i++) {
        unsigned char byte = (unsigned char)output->bytes[i];
        if (byte == '\n')
            text_add(line, "\\n");
        else if (byte == '\\')
            text_add(line, "\\\\");
        else if (byte < 0x20 || byte >= 0x7f)
            text_add(line, "\\x%02x", byte);
        else
            text_add(line, "%c", byte);
    }
}

/* `run SECONDS TEXT`: the shell's output, both streams, and its exit status. Killed with all its children when its time is over. */
static int cmd_run(int argc, char **argv, struct text *out) {
    if (argc != 2)
        return EINVAL;
    int pipe_fds[2];
    if (pipe2(pipe_fds, O_CLOEXEC) < 0)
        return errno;
    pid_t child = fork();
    if (child == 0) {
        setsid();
        dup2(pipe_fds[1], 1);
        dup2(pipe_fds[1], 2);
        execl("/bin/busybox", "sh", "-c", argv[1], NULL);
        _exit(127);
    }
    close(pipe_fds[1]);
    if (child < 0) {
        close(pipe_fds[0]);
        return errno;
    }
    struct timespec now, end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += atoi(argv[0]);
    int late = 0;
    for (;;) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        long left = (end.tv_sec - now.tv_sec) * 1000 + (end.tv_nsec - now.tv_nsec) / 1000000;
        struct pollfd poll_fd = {pipe_fds[0], POLLIN, 0};
        if (left <= 0 || poll(&poll_fd, 1, (int)left) == 0) {
            late = 1;
            break;
        }
        char piece[1024];
        ssize_t got = read(pipe_fds[0], piece, sizeof piece - 1);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        piece[got] = 0;
        text_add(out, "%s", piece);
    }
    close(pipe_fds[0]);
    if (late)
        kill(-child, SIGKILL);
    int status;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    if (late)
        return ETIMEDOUT;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int cmd_ping(int argc, char **argv, struct text *out) {
    for (int i = 0; i < argc; i++)
        text_add(out, i ? " %s" : "%s", argv[i]);
    return 0;
}

static const struct {
    const char *name;
    int (*run)(int argc, char **argv, struct text *out);
} COMMANDS[] = {
    {"ping", cmd_ping},     {"run", cmd_run},       {"hostname", cmd_hostname}, {"machine-id", cmd_machine_id}, {"net", cmd_net},
    {"clock", cmd_clock},   {"random", cmd_random}, {"prng", cmd_prng},         {"klog", cmd_klog},             {"work", cmd_work},
    {"reseeds", cmd_reseeds},
};

static void write_all(int port, const char *bytes, size_t len) {
    struct timespec tick = {0, 2000000};
    /* A request may be read before the kernel has heard that its sender is connected: until then the port takes nothing, and says that nobody
     * is there. For 10 s that is waited out; then whoever asked has gone, and so goes the rest of the reply. */
    for (int turn = 0; len > 0 && turn < 5000;) {
        ssize_t wrote = write(port, bytes, len);
        if (wrote > 0) {
            bytes += wrote;
            len -= (size_t)wrote;
        } else {
            nanosleep(&tick, NULL);
            turn++;
        }
    }
}

static void answer(int port, char *line) {
    static char reply_bytes[LINE_MAX_BYTES + 8], output_bytes[OUTPUT_ROOM];
    char *words[MAX_WORDS];
    int count = 0;
    char *rest = NULL;
    for (char *word = strtok_r(line, " ", &rest); word && count < MAX_WORDS; word = strtok_r(NULL, " ", &rest)) {
        unescape(word);
        words[count++] = word;
    }
    if (count < 2)
        return;
    struct text output = {output_bytes, 0, sizeof output_bytes, 0};
    output_bytes[0] = 0;
    int status = ENOSYS;
    for (size_t i = 0; i < sizeof COMMANDS / sizeof *COMMANDS; i++) {
        if (strcmp(words[1], COMMANDS[i].name) == 0) {
            status = COMMANDS[i].run(count - 2, words + 2, &output);
            break;
        }
    }
    struct text reply = {reply_bytes, 0, sizeof reply_bytes - 2, 0};
    text_add(&reply, "%.64s %d ", words[0], status);
    add_escaped(&reply, &output);
    reply_bytes[reply.len++] = '\n';
    write_all(port, reply_bytes, reply.len);
}

void run_agent(void) {
    /* A signal tells of a host that comes or goes; it is only ever waited for. */
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGIO);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    /* The kernel's own generator is ready before anybody hears of this guest: a fork reseeds only a generator that was seeded. */
    char word[32];
    struct text unused = {word, 0, sizeof word, 0};
    char *eight[] = {"8"};
    cmd_random(1, eight, &unused);

    int port = -1;
    struct timespec tick = {0, 5000000};
    for (int turn = 0; turn < 400 && (port = open_port()) < 0; turn++)
        nanosleep(&tick, NULL);
    if (port < 0) {
        ready_line("no agent port");
        for (;;)
            pause();
    }
    fcntl(port, F_SETOWN, getpid());
    fcntl(port, F_SETFL, O_NONBLOCK | O_ASYNC);
    ready_line("agent");

    static char line[LINE_MAX_BYTES];
    size_t len = 0;
    int overlong = 0;
    for (;;) {
        struct pollfd poll_fd = {port, POLLIN, 0};
        poll(&poll_fd, 1, -1);
        char piece[4096];
        ssize_t got = read(port, piece, sizeof piece);
        if (got == 0) {
            /* Nobody there, which the port calls readable. What was begun of a line was begun by somebody who has gone. */
            len = 0;
            overlong = 0;
            struct timespec wait = {0, 50000000};
            sigtimedwait(&signals, NULL, &wait);
        }
        for (ssize_t i = 0; i < got; i++) {
            if (piece[i] == CANCEL)
                len = 0, overlong = 0;
            else if (piece[i] == '\n') {
                line[len] = 0;
                if (!overlong)
                    answer(port, line);
                len = 0;
                overlong = 0;
            } else if (len < sizeof line - 1)
                line[len++] = piece[i];
            else
                overlong = 1;
        }
    }
}
