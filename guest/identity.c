/* What makes a clone its own: names, addresses, time, randomness. Each command answers with what holds afterwards, read back. */
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

int cmd_hostname(int argc, char **argv, struct text *out) {
    if (argc > 1)
        return EINVAL;
    if (argc == 1) {
        if (sethostname(argv[0], strlen(argv[0])) < 0)
            return errno;
        int error = file_write("/etc/hostname", argv[0], O_CREAT | O_TRUNC);
        if (error)
            return error;
    }
    char name[256];
    if (gethostname(name, sizeof name) < 0)
        return errno;
    text_add(out, "%s", name);
    return 0;
}

int cmd_machine_id(int argc, char **argv, struct text *out) {
    if (argc > 1)
        return EINVAL;
    if (argc == 1) {
        char line[64];
        if (strlen(argv[0]) != 32 || strspn(argv[0], "0123456789abcdef") != 32)
            return EINVAL;
        snprintf(line, sizeof line, "%s\n", argv[0]);
        int error = file_write("/etc/machine-id", line, O_CREAT | O_TRUNC);
        if (error)
            return error;
    }
    char id[64];
    int error = file_read("/etc/machine-id", id, sizeof id);
    if (error)
        return error;
    text_add(out, "%s", id);
    return 0;
}

static int mac_of(const char *text, unsigned char *mac) {
    unsigned byte[6];
    int end = 0;
    if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x%n", byte, byte + 1, byte + 2, byte + 3, byte + 4, byte + 5, &end) != 6 || text[end])
        return EINVAL;
    for (int i = 0; i < 6; i++)
        mac[i] = (unsigned char)byte[i];
    return 0;
}

static int interface_up(int fd, struct ifreq *request, int up) {
    if (ioctl(fd, SIOCGIFFLAGS, request) < 0)
        return errno;
    request->ifr_flags = (short)(up ? request->ifr_flags | IFF_UP : request->ifr_flags & ~IFF_UP);
    return ioctl(fd, SIOCSIFFLAGS, request) < 0 ? errno : 0;
}

static int set_address(int fd, struct ifreq *request, unsigned long what, in_addr_t address) {
    struct sockaddr_in *in = (struct sockaddr_in *)&request->ifr_addr;
    memset(in, 0, sizeof *in);
    in->sin_family = AF_INET;
    in->sin_addr.s_addr = address;
    return ioctl(fd, what, request) < 0 ? errno : 0;
}

/* `net NAME [MAC [ADDRESS/BITS]]`. The interface is down while it changes. Answers MAC, address, carrier (0, 1, or - while it is down). */
int cmd_net(int argc, char **argv, struct text *out) {
    if (argc < 1 || argc > 3)
        return EINVAL;
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", argv[0]);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return errno;
    int error = 0;
    if (argc > 1) {
        unsigned char mac[6];
        if ((error = mac_of(argv[1], mac)) || (error = interface_up(fd, &request, 0)))
            goto out;
        request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
        memcpy(request.ifr_hwaddr.sa_data, mac, 6);
        if (ioctl(fd, SIOCSIFHWADDR, &request) < 0) {
            error = errno;
            goto out;
        }
    }
    if (argc > 2) {
        char *slash = strchr(argv[2], '/');
        int bits = slash ? atoi(slash + 1) : 0;
        struct in_addr address;
        if (slash)
            *slash = 0;
        if (bits < 1 || bits > 32 || inet_pton(AF_INET, argv[2], &address) != 1) {
            error = EINVAL;
            goto out;
        }
        if ((error = set_address(fd, &request, SIOCSIFADDR, address.s_addr))
            || (error = set_address(fd, &request, SIOCSIFNETMASK, htonl(~0u << (32 - bits)))))
            goto out;
    }
    if (argc > 1 && (error = interface_up(fd, &request, 1)))
        goto out;
    if (ioctl(fd, SIOCGIFHWADDR, &request) < 0) {
        error = errno;
        goto out;
    }
    unsigned char *mac = (unsigned char *)request.ifr_hwaddr.sa_data;
    text_add(out, "%02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]);
    char shown[INET_ADDRSTRLEN] = "-";
    if (ioctl(fd, SIOCGIFADDR, &request) == 0)
        inet_ntop(AF_INET, &((struct sockaddr_in *)&request.ifr_addr)->sin_addr, shown, sizeof shown);
    char path[300], carrier[8];
    snprintf(path, sizeof path, "/sys/class/net/%.200s/carrier", argv[0]);
    if (file_read(path, carrier, sizeof carrier) != 0)
        strcpy(carrier, "-");
    text_add(out, " %s %s", shown, carrier);
out:
    close(fd);
    return error;
}

/* `clock [SECONDS NANOSECONDS]`: sets the wall clock; answers the wall clock and the monotonic one. */
int cmd_clock(int argc, char **argv, struct text *out) {
    if (argc == 2) {
        struct timespec set = {strtoll(argv[0], NULL, 10), strtol(argv[1], NULL, 10)};
        if (clock_settime(CLOCK_REALTIME, &set) < 0)
            return errno;
    } else if (argc != 0)
        return EINVAL;
    struct timespec wall, steady;
    clock_gettime(CLOCK_REALTIME, &wall);
    clock_gettime(CLOCK_MONOTONIC, &steady);
    text_add(out, "%lld.%09ld %lld.%09ld", (long long)wall.tv_sec, wall.tv_nsec, (long long)steady.tv_sec, steady.tv_nsec);
    return 0;
}

/* `random BYTES`: of the kernel's generator, in hexadecimal. */
int cmd_random(int argc, char **argv, struct text *out) {
    unsigned char bytes[256];
    size_t len = argc == 1 ? (size_t)atoi(argv[0]) : 0;
    if (len == 0 || len > sizeof bytes)
        return EINVAL;
    if (getrandom(bytes, len, 0) != (ssize_t)len)
        return EIO;
    for (size_t i = 0; i < len; i++)
        text_add(out, "%02x", bytes[i]);
    return 0;
}

/* `prng [reseed]`: a number of a generator in the program's own memory, seeded once from the kernel's, as many programs do. */
int cmd_prng(int argc, char **argv, struct text *out) {
    static uint64_t state;
    int reseed = argc == 1 && strcmp(argv[0], "reseed") == 0;
    if (argc > 0 && !reseed)
        return EINVAL;
    while (state == 0 || reseed) {
        reseed = 0;
        if (getrandom(&state, sizeof state, 0) != sizeof state)
            return EIO;
    }
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    text_add(out, "%016llx", (unsigned long long)state);
    return 0;
}

/* Calls this with each record of the kernel's log. 0 or an errno. */
static int each_record(void (*visit)(char *record, void *with), void *with) {
    int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return errno;
    char record[8192];
    for (;;) {
        ssize_t got = read(fd, record, sizeof record - 1);
        if (got < 0 && (errno == EPIPE || errno == EINTR))
            continue;
        if (got <= 0)
            break;
        record[got] = 0;
        record[strcspn(record, "\n")] = 0;
        visit(record, with);
    }
    close(fd);
    return 0;
}

struct search {
    const char *text;
    struct text *out;
    unsigned long long found, last;
};

static void add_found(char *record, void *with) {
    struct search *search = with;
    if (!strstr(record, search->text))
        return;
    search->found++;
    /* Priority, number, microseconds since boot. */
    sscanf(record, "%*u,%*u,%llu", &search->last);
    if (search->out)
        text_add(search->out, "%s\n", record);
}

/* `klog TEXT`: the records of the kernel's log that hold it. */
int cmd_klog(int argc, char **argv, struct text *out) {
    if (argc != 1)
        return EINVAL;
    struct search search = {argv[0], out, 0, 0};
    return each_record(add_found, &search);
}

/* `reseeds`: how often the kernel reseeded because the machine was forked, when last, and what time it is, in microseconds of the log's own
 * clock, which a line of ours in the log tells. */
int cmd_reseeds(int argc, char **argv, struct text *out) {
    (void)argv;
    if (argc != 0)
        return EINVAL;
    int error = file_write("/dev/kmsg", "<7>offshoot-guest: asked for reseeds", 0);
    struct search reseeds = {"reseeded due to virtual machine fork", NULL, 0, 0}, now = {"offshoot-guest: asked", NULL, 0, 0};
    error = error ? error : each_record(add_found, &reseeds);
    error = error ? error : each_record(add_found, &now);
    text_add(out, "%llu %llu %llu", reseeds.found, reseeds.last, now.last);
    return error;
}
