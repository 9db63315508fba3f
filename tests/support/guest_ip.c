#include "guest_ip.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

static const uint8_t our_mac[6] = { 0x52, 0x54, 0, 0x12, 0x34, 0x56 };

static void put16(uint8_t *p, unsigned v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
}

static void put32(uint8_t *p, uint32_t v)
{
	put16(p, v >> 16);
	put16(p + 2, v & 0xffff);
}

static unsigned get16(const uint8_t *p)
{
	return (unsigned)p[0] << 8 | p[1];
}

static uint32_t get32(const uint8_t *p)
{
	return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static uint32_t sum16(uint32_t sum, const uint8_t *p, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		sum += i & 1 ? p[i] : (uint32_t)p[i] << 8;
		sum = (sum & 0xffff) + (sum >> 16);
	}
	return sum;
}

static unsigned transport_sum(uint8_t proto, uint32_t dst, const uint8_t *p, size_t len)
{
	uint8_t pseudo[12] = { [9] = proto };
	uint32_t sum;

	put32(pseudo, GUEST_IP);
	put32(pseudo + 4, dst);
	put16(pseudo + 10, (unsigned)len);
	sum = ~sum16(sum16(0, pseudo, 12), p, len) & 0xffff;
	return sum ? sum : 0xffff;
}

void guest_raw(struct guest *g, const void *frame, size_t len)
{
	struct pollfd p = { g->fd, POLLOUT };

	while (send(g->fd, frame, len, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		if (errno != EAGAIN || poll(&p, 1, GUEST_WAIT_MS) != 1)
			return;
}

void guest_eth(struct guest *g, uint16_t type, const void *payload, size_t len)
{
	static uint8_t f[70000];

	memset(f, 0xff, 6);
	memcpy(f + 6, our_mac, 6);
	put16(f + 12, type);
	memcpy(f + 14, payload, len);
	guest_raw(g, f, 14 + len);
}

void guest_ip(struct guest *g, uint8_t proto, uint32_t dst, uint16_t frag, const void *payload,
	size_t len)
{
	static uint8_t p[66000];

	memset(p, 0, 20);
	p[0] = 0x45;
	put16(p + 2, (unsigned)(20 + len));
	put16(p + 4, frag ? 0x77 : ++g->ident);
	put16(p + 6, frag);
	p[8] = 64;
	p[9] = proto;
	put32(p + 12, GUEST_IP);
	put32(p + 16, dst);
	put16(p + 10, ~sum16(0, p, 20) & 0xffff);
	memcpy(p + 20, payload, len);
	guest_eth(g, 0x0800, p, 20 + len);
}

void guest_udp(struct guest *g, uint32_t dst, uint16_t sport, uint16_t dport, const void *data,
	size_t len)
{
	static uint8_t p[66000];

	put16(p, sport);
	put16(p + 2, dport);
	put16(p + 4, (unsigned)(8 + len));
	put16(p + 6, 0);
	memcpy(p + 8, data, len);
	put16(p + 6, transport_sum(IPPROTO_UDP, dst, p, 8 + len));
	guest_ip(g, IPPROTO_UDP, dst, 0, p, 8 + len);
}

void guest_tcp(struct guest *g, uint32_t dst, uint16_t sport, uint16_t dport, uint32_t seq, uint32_t ack,
	uint8_t flags, const void *data, size_t len)
{
	static uint8_t p[66000];
	size_t hlen = flags & TCP_SYN ? 24 : 20;

	memset(p, 0, 24);
	put16(p, sport);
	put16(p + 2, dport);
	put32(p + 4, seq);
	put32(p + 8, ack);
	p[12] = (uint8_t)(hlen / 4 << 4);
	p[13] = flags;
	put16(p + 14, 65535);
	if (flags & TCP_SYN) {
		p[20] = 2;
		p[21] = 4;
		put16(p + 22, 65480);
	}
	if (len)
		memcpy(p + hlen, data, len);
	put16(p + 16, transport_sum(IPPROTO_TCP, dst, p, hlen + len));
	guest_ip(g, IPPROTO_TCP, dst, 0, p, hlen + len);
}

static void arp(struct guest *g, unsigned op, const uint8_t *to_mac, uint32_t to)
{
	uint8_t p[28] = { 0, 1, 8, 0, 6, 4, 0, (uint8_t)op };

	memcpy(p + 8, our_mac, 6);
	put32(p + 14, GUEST_IP);
	memcpy(p + 18, to_mac, 6);
	put32(p + 24, to);
	guest_eth(g, 0x0806, p, sizeof(p));
}

void guest_arp(struct guest *g, uint32_t who)
{
	arp(g, 1, (const uint8_t[6]){ 0 }, who);
}

static int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000ll + ts.tv_nsec / 1000000;
}

bool guest_next(struct guest *g, int ms)
{
	int64_t end = now_ms() + ms;

	for (;;) {
		struct pollfd p = { g->fd, POLLIN };
		int64_t left = end - now_ms();
		ssize_t n;

		if (poll(&p, 1, left > 0 ? (int)left : 0) != 1)
			return false;
		n = recv(g->fd, g->frame, sizeof(g->frame), MSG_DONTWAIT);
		if (n <= 0)
			return false;
		g->len = (size_t)n;
		if (n >= 42 && get16(g->frame + 12) == 0x0806 && g->frame[21] == 1) {
			if (get32(g->frame + 38) == GUEST_IP)
				arp(g, 2, g->frame + 22, get32(g->frame + 28));
			continue;
		}
		return true;
	}
}

bool guest_wait_arp(struct guest *g, uint32_t who, int ms)
{
	int64_t end = now_ms() + ms;

	while (guest_next(g, (int)(end - now_ms() > 0 ? end - now_ms() : 0)))
		if (g->len >= 42 && get16(g->frame + 12) == 0x0806 && g->frame[21] == 2 &&
			get32(g->frame + 28) == who)
			return true;
	return false;
}

static bool parse(const struct guest *g, struct packet *p)
{
	const uint8_t *ip = g->frame + 14, *t;
	size_t hlen, total;

	memset(p, 0, sizeof(*p));
	if (g->len < 34 || get16(g->frame + 12) != 0x0800)
		return false;
	hlen = (size_t)(ip[0] & 15) * 4;
	total = get16(ip + 2);
	if (total > g->len - 14 || total < hlen + 8)
		return false;
	t = ip + hlen;
	p->proto = ip[9];
	p->src = get32(ip + 12);
	p->dst = get32(ip + 16);
	p->data = t + 8;
	p->len = total - hlen - 8;
	if (p->proto == IPPROTO_ICMP) {
		p->flags = t[0];
		return true;
	}
	p->sport = (uint16_t)get16(t);
	p->dport = (uint16_t)get16(t + 2);
	if (p->proto == IPPROTO_TCP) {
		size_t thlen = (size_t)(t[12] >> 4) * 4;

		p->seq = get32(t + 4);
		p->ack = get32(t + 8);
		p->flags = t[13];
		p->data = t + thlen;
		p->len = total - hlen - thlen;
	}
	return true;
}

bool guest_wait(struct guest *g, struct packet *p, uint8_t proto, uint16_t dport, int ms)
{
	int64_t end = now_ms() + ms;

	while (guest_next(g, (int)(end - now_ms() > 0 ? end - now_ms() : 0)))
		if (parse(g, p) && p->proto == proto &&
			(!dport || proto == IPPROTO_ICMP || p->dport == dport))
			return true;
	return false;
}

uint32_t guest_dhcp(struct guest *g)
{
	static const uint8_t cookie[4] = { 0x63, 0x82, 0x53, 0x63 };
	uint32_t offered = 0;
	struct packet p;

	for (unsigned type = 1; type <= 3; type += 2) {         /* discover, request */
		uint8_t m[300] = { 1, 1, 6, 0, 1, 2, 3, 4 };

		memcpy(m + 28, our_mac, 6);
		memcpy(m + 236, cookie, 4);
		m[240] = 53;
		m[241] = 1;
		m[242] = (uint8_t)type;
		m[243] = 50;
		m[244] = 4;
		put32(m + 245, offered);
		m[type == 1 ? 243 : 249] = 255;
		guest_udp(g, 0xffffffff, 68, 67, m, sizeof(m));
		if (!guest_wait(g, &p, IPPROTO_UDP, 68, GUEST_WAIT_MS) || p.len < 240 || p.data[0] != 2)
			return 0;
		offered = get32(p.data + 16);
	}
	return offered;
}
