/* The media as one process sees them: a block of a slot written, read back, and spoiled on purpose. */
#ifndef MEDIA_H
#define MEDIA_H

#include "record.h"

/* How a block is read. */
enum route {
    AS_WRITTEN, /* through memory or the page cache */
    FROM_DISK   /* past the page cache, for all that is in files */
};

/* Opens what this medium is kept in, of this many slots; makes it where it is missing. 0 or an errno. */
int medium_open(enum medium medium, uint32_t slots);

/* All of these: 0 or an errno. */
int medium_write(enum medium medium, uint32_t slot, const struct block *block);
int medium_read(enum medium medium, uint32_t slot, enum route route, struct block *block);
int medium_remove(enum medium medium, uint32_t slot);

/* Gives up mappings before caches are dropped; the next use maps again. */
void medium_unmap(enum medium medium);

#endif
