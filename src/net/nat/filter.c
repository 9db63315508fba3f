/*
 * How this works
 *
 * libslirp has a record of trusting lengths in packets. Every frame passes here first: only ARP, IPv4 and
 * IPv6, only TCP, UDP and what ICMP a guest needs, every header whole and every length inside the one
 * around it. libslirp translates only 10.0.2.2 and fec0::2 to the host's loopback, and can be told not to;
 * a packet sent to 127.0.0.1 itself it would simply pass on, so destinations are judged here, by the
 * address in the IP header, which every fragment carries.
 */
#include "net/nat/filter.h"
#include <arpa/inet.h>
#include <net/ethernet.h>
#include <net/if_arp.h>
#include <netinet/in.h>
#include <string.h>

#define ETH_HEADER  14
#define ARP_LEN     28
#define IP_HEADER   20
#define IP6_HEADER  40
#define TCP_HEADER  20
#define UDP_HEADER  8
#define ICMP_HEADER 8
#define ICMP_ECHO   8
#define TFTP_PORT   69

static unsigned be16(const uint8_t *p)
{
	return (unsigned)p[0] << 8 | p[1];
}

static enum nat_verdict arp(const uint8_t *p, size_t len)
{
	if (len < ARP_LEN)
		return NAT_MALFORMED;
	return be16(p) == ARPHRD_ETHER && be16(p + 2) == ETHERTYPE_IP && p[4] == ETH_ALEN && p[5] == 4 ?
		NAT_PASS : NAT_UNKNOWN;
}

/* The start of a TCP, UDP or ICMP packet; whole: len is all of it (not a first fragment). */
static enum nat_verdict transport(unsigned proto, const uint8_t *p, size_t len, bool whole)
{
	size_t hlen;

	switch (proto) {
	case IPPROTO_TCP:
		if (len < TCP_HEADER)
			return NAT_MALFORMED;
		hlen = (size_t)(p[12] >> 4) * 4;
		return hlen >= TCP_HEADER && hlen <= len ? NAT_PASS : NAT_MALFORMED;
	case IPPROTO_UDP:
		if (len < UDP_HEADER || be16(p + 4) < UDP_HEADER || (whole && be16(p + 4) > len))
			return NAT_MALFORMED;
		return be16(p + 2) == TFTP_PORT ? NAT_UNKNOWN : NAT_PASS;
	case IPPROTO_ICMP:
		if (len < ICMP_HEADER)
			return NAT_MALFORMED;
		return p[0] == ICMP_ECHO ? NAT_PASS : NAT_UNKNOWN;
	case IPPROTO_ICMPV6:
		return len < ICMP_HEADER ? NAT_MALFORMED : NAT_PASS;
	default:
		return NAT_UNKNOWN;
	}
}

/* RFC 1122 3.2.1.3, RFC 3927; 0.0.0.0/8 is this host to Linux. */
static bool forbidden4(const uint8_t *a, bool host_allowed)
{
	if (a[0] == 169 && a[1] == 254)
		return true;
	return (a[0] == 127 || a[0] == 0) && !host_allowed;
}

static enum nat_verdict ip4(const uint8_t *p, size_t len, bool host_allowed)
{
	size_t hlen, total, frag;

	if (len < IP_HEADER)
		return NAT_MALFORMED;
	hlen = (size_t)(p[0] & 15) * 4;
	total = be16(p + 2);
	if (p[0] >> 4 != 4 || hlen < IP_HEADER || hlen > total || total > len)
		return NAT_MALFORMED;
	if (forbidden4(p + 16, host_allowed))
		return NAT_FORBIDDEN;
	frag = (size_t)(be16(p + 6) & 0x1fff) * 8;
	if (frag && frag + (total - hlen) > 65535)
		return NAT_MALFORMED;
	if (be16(p + 6) & 0x2000 && (total == hlen || (total - hlen) % 8))
		return NAT_MALFORMED;   /* RFC 791: all fragments but the last are multiples of 8 */
	if (frag)
		return p[9] == IPPROTO_TCP || p[9] == IPPROTO_UDP || p[9] == IPPROTO_ICMP ?
			NAT_PASS : NAT_UNKNOWN;
	if (p[9] == IPPROTO_ICMPV6)
		return NAT_UNKNOWN;
	return transport(p[9], p + hlen, total - hlen, !(be16(p + 6) & 0x2000));
}

/* ::/96 with ::1 and ::, IPv4 in IPv6, and the metadata address of one large provider. */
static bool forbidden6(const uint8_t *a, bool host_allowed)
{
	static const uint8_t zero[12], mapped[12] = { [10] = 0xff, 0xff };
	static const uint8_t metadata[16] = { 0xfd, 0x00, 0x0e, 0xc2, [14] = 0x02, 0x54 };

	if (!memcmp(a, metadata, sizeof(metadata)) || !memcmp(a, mapped, sizeof(mapped)))
		return true;
	return !memcmp(a, zero, sizeof(zero)) && (memcmp(a + 12, "\0\0\0\1", 4) || !host_allowed);
}

static enum nat_verdict ip6(const uint8_t *p, size_t len, bool host_allowed)
{
	size_t payload;

	if (len < IP6_HEADER)
		return NAT_MALFORMED;
	payload = be16(p + 4);
	if (p[0] >> 4 != 6 || payload > len - IP6_HEADER)
		return NAT_MALFORMED;
	if (forbidden6(p + 24, host_allowed))
		return NAT_FORBIDDEN;
	if (p[24] == 0xfe && (p[25] & 0xc0) == 0x80 && p[6] != IPPROTO_ICMPV6)
		return NAT_FORBIDDEN;   /* RFC 4291, 2.5.6: link-local; neighbour discovery needs it, others not */
	if (p[6] == IPPROTO_ICMP)
		return NAT_UNKNOWN;
	return transport(p[6], p + IP6_HEADER, payload, true);  /* no extension headers: libslirp reads none */
}

enum nat_verdict nat_filter(const uint8_t *frame, size_t len, bool host_allowed)
{
	if (len < ETH_HEADER)
		return NAT_MALFORMED;
	switch (be16(frame + 12)) {
	case ETHERTYPE_ARP:
		return arp(frame + ETH_HEADER, len - ETH_HEADER);
	case ETHERTYPE_IP:
		return ip4(frame + ETH_HEADER, len - ETH_HEADER, host_allowed);
	case ETHERTYPE_IPV6:
		return ip6(frame + ETH_HEADER, len - ETH_HEADER, host_allowed);
	default:
		return NAT_UNKNOWN;
	}
}
