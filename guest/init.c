/* Process 1. In the initramfs: loads the modules listed in /modules/order, mounts the disk that `root=` names and goes on as process 1 of
 * that; without a disk it stays. Then it starts the agent and buries the dead. It says on the console how far it came, one line when all is
 * there: a host that waits reads that line. */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void say(const char *format, const char *what, int error) {
    dprintf(2, format, what, strerror(error));
}

/* Process 1 may not end: the kernel would panic, and that is what a broken image should do, loudly. */
static void give_up(const char *what, int error) {
    say("guest: %s: %s\n", what, error);
    exit(1);
}

static void mount_at(const char *what, const char *where, const char *type, unsigned long flags) {
    mkdir(where, 0755);
    if (mount(what, where, type, flags, NULL) < 0 && errno != EBUSY)
        give_up(where, errno);
}

/* The order is the builder's: each module after those it needs. */
static void load_modules(void) {
    FILE *order = fopen("/modules/order", "re");
    if (!order)
        return;
    char name[256], path[300];
    while (fgets(name, sizeof name, order)) {
        name[strcspn(name, "\n")] = 0;
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            give_up(path, errno);
        close(fd);
    }
    fclose(order);
}

/* The value of `root=` on the kernel's command line, or 0. */
static int root_device(char *device, size_t room) {
    char line[4096];
    if (file_read("/proc/cmdline", line, sizeof line) != 0)
        return 0;
    for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) {
        if (strncmp(word, "root=", 5) == 0) {
            snprintf(device, room, "%s", word + 5);
            return 1;
        }
    }
    return 0;
}

static void enter_disk(const char *device) {
    /* Drivers probe on their own time: 30 s of looking every millisecond. */
    struct timespec tick = {0, 1000000};
    for (int turn = 0; access(device, F_OK) < 0; turn++) {
        if (turn == 30000)
            give_up(device, ENODEV);
        nanosleep(&tick, NULL);
    }
    mkdir("/root", 0755);
    if (mount(device, "/root", "ext4", 0, NULL) < 0)
        give_up(device, errno);
    const char *moved[] = {"/dev", "/proc", "/sys"};
    for (int i = 0; i < 3; i++) {
        char to[32];
        snprintf(to, sizeof to, "/root%s", moved[i]);
        if (mount(moved[i], to, NULL, MS_MOVE, NULL) < 0)
            give_up(to, errno);
    }
    if (chdir("/root") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        give_up("root", errno);
    execl("/sbin/init", "init", NULL);
    give_up("/sbin/init", errno);
}

void run_init(void) {
    mount_at("dev", "/dev", "devtmpfs", 0);
    int console = open("/dev/console", O_RDWR);
    if (console >= 0) {
        for (int fd = 0; fd < 3; fd++)
            dup2(console, fd);
        if (console > 2)
            close(console);
    }
    mount_at("proc", "/proc", "proc", 0);
    mount_at("sys", "/sys", "sysfs", 0);
    load_modules();
    char device[256];
    if (access("/modules/order", F_OK) == 0 && root_device(device, sizeof device))
        enter_disk(device);

    mount_at("run", "/run", "tmpfs", 0);
    mount_at("tmp", "/tmp", "tmpfs", 0);
    setenv("PATH", "/bin:/sbin", 1);
    setenv("HOME", "/", 1);
    pid_t agent = fork();
    if (agent == 0) {
        setsid();
        run_agent();
    }
    if (agent < 0)
        give_up("agent", errno);
    for (;;) {
        int status;
        pid_t dead = wait(&status);
        if (dead == agent)
            give_up("the agent ended", WIFEXITED(status) ? 0 : EINTR);
        if (dead < 0 && errno != EINTR)
            give_up("wait", errno);
    }
}
