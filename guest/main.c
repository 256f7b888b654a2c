/* One static program, so that a guest's file system holds one file of ours and a build compiles once. */
#include "guest.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "check") == 0)
        return run_check(argc - 2, argv + 2);
    if (getpid() == 1)
        run_init();
    fprintf(stderr, "usage: %s check FILE SLOTS FLOOR\n", argv[0]);
    return 2;
}
