#include "net/nat/reassemble.h"
#include <arpa/inet.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"

#define ETH_HEADER 14
#define IP_HEADER  20
#define LARGEST    (ETH_HEADER + 65535)
#define MORE       0x2000               /* RFC 791: more fragments follow */
#define OFFSET     0x1fff

static unsigned be16(const uint8_t *p)
{
	return (unsigned)p[0] << 8 | p[1];
}

/* RFC 791: identification, protocol, source and destination say what belongs together. */
static bool same_datagram(const uint8_t *a, const uint8_t *b)
{
	return !memcmp(a + 18, b + 18, 2) && a[23] == b[23] && !memcmp(a + 26, b + 26, 8);
}

static struct datagram *find(struct reassemble *r, const uint8_t *frame)
{
	for (unsigned i = 0; i < REASSEMBLE_SLOTS; i++)
		if (r->slot[i].len && same_datagram(r->slot[i].frame, frame))
			return &r->slot[i];
	return NULL;
}

/* A slot for a new datagram, NULL if there is no memory. */
static struct datagram *place(struct reassemble *r)
{
	struct datagram *d = &r->slot[0];

	for (unsigned i = 1; i < REASSEMBLE_SLOTS; i++)
		if (r->slot[i].len ? d->len && r->slot[i].age < d->age : d->len)
			d = &r->slot[i];
	if (!d->frame)
		d->frame = malloc(LARGEST);
	return d->frame ? d : NULL;
}

/* The header of a whole datagram; the checksum as libslirp will verify it (RFC 1071). */
static void finish(struct datagram *d)
{
	uint8_t *ip = d->frame + ETH_HEADER;
	uint32_t sum = 0;
	uint16_t word = htons((uint16_t)(d->len - ETH_HEADER));

	memcpy(ip + 2, &word, 2);
	memset(ip + 6, 0, 2);
	memset(ip + 10, 0, 2);
	for (unsigned i = 0; i < IP_HEADER; i += 2)
		sum += be16(ip + i);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	word = htons((uint16_t)~sum);
	memcpy(ip + 10, &word, 2);
}

const uint8_t *reassemble(struct reassemble *r, const uint8_t *frame, size_t *len)
{
	const uint8_t *ip = frame + ETH_HEADER;
	unsigned frag = be16(ip + 6);
	size_t hlen = (size_t)(ip[0] & 15) * 4, data = be16(ip + 2) - hlen;
	struct datagram *d;

	if (!(frag & (MORE | OFFSET)))
		return frame;
	d = find(r, frame);
	if (!(frag & OFFSET)) {         /* the first: options are left out */
		if (d || !(d = place(r))) {
			if (d)
				d->len = 0;
			return NULL;
		}
		memcpy(d->frame, frame, ETH_HEADER + IP_HEADER);
		d->frame[ETH_HEADER] = 0x45;
		d->len = ETH_HEADER + IP_HEADER;
		d->age = ++r->clock;
	}
	if (!d)
		return NULL;
	if ((size_t)(frag & OFFSET) * 8 != d->len - ETH_HEADER - IP_HEADER || data > LARGEST - d->len) {
		d->len = 0;
		return NULL;
	}
	memcpy(d->frame + d->len, ip + hlen, data);
	d->len += data;
	if (frag & MORE)
		return NULL;
	finish(d);
	*len = d->len;
	d->len = 0;
	return d->frame;
}

void reassemble_done(struct reassemble *r)
{
	for (unsigned i = 0; i < REASSEMBLE_SLOTS; i++)
		free(TAKE_PTR(r->slot[i].frame));
}
