/* Small files read and written whole, and text that grows. */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

void text_add(struct text *text, const char *format, ...) {
    va_list args;
    va_start(args, format);
    size_t left = text->room - text->len;
    int need = vsnprintf(text->bytes + text->len, left, format, args);
    va_end(args);
    if (need < 0 || (size_t)need >= left) {
        text->full = 1;
        text->bytes[text->len] = 0;
        return;
    }
    text->len += (size_t)need;
}

int file_write(const char *path, const char *text, int flags) {
    int fd = open(path, O_WRONLY | O_CLOEXEC | flags, 0644);
    if (fd < 0)
        return errno;
    size_t len = strlen(text);
    ssize_t wrote = write(fd, text, len);
    int error = wrote < 0 ? errno : (size_t)wrote < len ? EIO : 0;
    if (close(fd) < 0 && error == 0)
        error = errno;
    return error;
}

int file_read(const char *path, char *text, size_t room) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    size_t len = 0;
    for (;;) {
        ssize_t got = read(fd, text + len, room - 1 - len);
        if (got < 0) {
            int error = errno;
            close(fd);
            return error;
        }
        if (got == 0)
            break;
        len += (size_t)got;
        if (len == room - 1)
            break;
    }
    close(fd);
    text[len] = 0;
    while (len > 0 && text[len - 1] == '\n')
        text[--len] = 0;
    return 0;
}
