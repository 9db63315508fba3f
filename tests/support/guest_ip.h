#ifndef GUEST_IP_H
#define GUEST_IP_H
/*
 * The IP stack of a very small guest, for tests of the NAT: builds frames, waits for the one it wants, and
 * answers ARP meanwhile. Addresses and ports are in host order. Nothing waits longer than GUEST_WAIT_MS.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define GUEST_WAIT_MS 60000
#define GUEST_IP      0x0a00020fu       /* 10.0.2.15 */
#define GATEWAY_IP    0x0a000202u
#define DNS_IP        0x0a000203u

struct guest {
	int fd;                         /* one frame a message */
	uint8_t frame[70000];           /* the last one received */
	size_t len;
	uint16_t ident;
};

/* A received packet, pointing into guest.frame. */
struct packet {
	uint8_t proto;                  /* IPPROTO_* */
	uint32_t src, dst;
	uint16_t sport, dport;
	uint32_t seq, ack;              /* TCP */
	uint8_t flags;
	const uint8_t *data;
	size_t len;
};
#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_PSH 8
#define TCP_ACK 16

void guest_raw(struct guest *g, const void *frame, size_t len);
void guest_eth(struct guest *g, uint16_t type, const void *payload, size_t len);
/* frag: the fragment field of the IP header, flags and offset. */
void guest_ip(struct guest *g, uint8_t proto, uint32_t dst, uint16_t frag, const void *payload,
	size_t len);
void guest_udp(struct guest *g, uint32_t dst, uint16_t sport, uint16_t dport, const void *data,
	size_t len);
/* window 65535; a SYN announces an MSS of 65480 */
void guest_tcp(struct guest *g, uint32_t dst, uint16_t sport, uint16_t dport, uint32_t seq, uint32_t ack,
	uint8_t flags, const void *data, size_t len);
void guest_arp(struct guest *g, uint32_t who);

/* The next frame within ms. ARP requests for us are answered and skipped. */
bool guest_next(struct guest *g, int ms);
/* Wait for an IPv4 packet of proto to dport (0: any; ignored for ICMP). False: none came in ms. */
bool guest_wait(struct guest *g, struct packet *p, uint8_t proto, uint16_t dport, int ms);
bool guest_wait_arp(struct guest *g, uint32_t who, int ms);
/* DHCP from discover to ack: the address, 0 if that failed. */
uint32_t guest_dhcp(struct guest *g);
#endif
