#ifndef NAT_REASSEMBLE_H
#define NAT_REASSEMBLE_H
/*
 * IPv4 fragments of the guest's, put together before libslirp sees them: its own reassembly can be made to
 * follow a null pointer. Only what guests do is taken: the fragments of a datagram in order, without gap
 * or overlap. A fragment that does not fit ends its datagram.
 */
#include <stddef.h>
#include <stdint.h>

#define REASSEMBLE_SLOTS 4              /* datagrams under way; the oldest gives way */

struct datagram {
	uint8_t *frame;                 /* NULL: free; else room for the largest */
	size_t len;                     /* Ethernet and IP header and data so far */
	uint64_t age;
};

struct reassemble {
	struct datagram slot[REASSEMBLE_SLOTS];
	uint64_t clock;
};

/*
 * frame passed nat_filter() and is IPv4. The whole datagram's frame if this was no fragment or the last one, valid
 * until the next call, *len its length; NULL if there is nothing to deliver yet.
 */
const uint8_t *reassemble(struct reassemble *r, const uint8_t *frame, size_t *len);
void reassemble_done(struct reassemble *r);
#endif
