/* vmm-nat, the real program, spoken to by a very small guest. All host traffic stays on the loopback. */
#include <arpa/inet.h>
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "nat_process.h"
#include "net/nat/config.h"
#include "net/nat/filter.h"

static int listener(int type, uint16_t *port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
	socklen_t len = sizeof(a);

	ck_assert(fd >= 0 && !bind(fd, (struct sockaddr *)&a, sizeof(a)));
	ck_assert(type == SOCK_DGRAM || !listen(fd, 8));
	ck_assert(!getsockname(fd, (struct sockaddr *)&a, &len));
	*port = ntohs(a.sin_port);
	return fd;
}

static bool readable(int fd, int ms)
{
	struct pollfd p = { fd, POLLIN };

	return poll(&p, 1, ms) == 1;
}

START_TEST(test_arp_and_dhcp_give_the_guest_its_address)
{
	struct nat_process p;

	nat_start(&p, "mtu 65520\nhost deny\n");
	ck_assert_str_eq(p.answer, "ok");
	ck_assert(nat_alive(&p, GUEST_WAIT_MS));
	ck_assert_uint_eq(guest_dhcp(&p.g), GUEST_IP);
	nat_stop(&p);
}
END_TEST

START_TEST(test_udp_echo_with_host_allowed)
{
	struct sockaddr_in from;
	socklen_t len = sizeof(from);
	struct nat_process p;
	static char big[9000], buf[10000];
	struct packet r;
	uint16_t port;
	int s = listener(SOCK_DGRAM, &port);
	ssize_t n;

	nat_start(&p, "host allow\n");
	memset(big, 'x', sizeof(big));
	guest_udp(&p.g, GATEWAY_IP, 5555, port, big, sizeof(big));
	ck_assert(readable(s, GUEST_WAIT_MS));
	n = recvfrom(s, buf, sizeof(buf), 0, (struct sockaddr *)&from, &len);
	ck_assert_int_eq(n, sizeof(big));
	ck_assert_int_eq(sendto(s, buf, (size_t)n, 0, (struct sockaddr *)&from, len), n);
	ck_assert(guest_wait(&p.g, &r, IPPROTO_UDP, 5555, GUEST_WAIT_MS));
	ck_assert(r.src == GATEWAY_IP && r.sport == port && r.len == sizeof(big));
	ck_assert(!memcmp(r.data, big, sizeof(big)));
	nat_stop(&p);
	close(s);
}
END_TEST

/* From the guest's SYN to an established connection; the guest's next sequence number is 1001. */
static bool tcp_open(struct nat_process *p, uint32_t dst, uint16_t port, struct packet *r, int ms)
{
	guest_tcp(&p->g, dst, 4000, port, 1000, 0, TCP_SYN, NULL, 0);
	if (!guest_wait(&p->g, r, IPPROTO_TCP, 4000, ms) || r->flags != (TCP_SYN | TCP_ACK))
		return false;
	guest_tcp(&p->g, dst, 4000, port, 1001, r->seq + 1, TCP_ACK, NULL, 0);
	return true;
}

START_TEST(test_tcp_connect_and_a_large_segment_each_way)
{
	static char big[60000], back[60000];
	struct nat_process p;
	struct packet r;
	uint16_t port;
	int s = listener(SOCK_STREAM, &port), c;
	uint32_t seq;
	size_t got = 0;

	nat_start(&p, "host allow\nmtu 65520\n");
	ck_assert(tcp_open(&p, GATEWAY_IP, port, &r, GUEST_WAIT_MS));
	seq = r.seq + 1;
	ck_assert(readable(s, GUEST_WAIT_MS));
	ck_assert_int_ge(c = accept(s, NULL, NULL), 0);
	for (size_t i = 0; i < sizeof(big); i++)
		big[i] = (char)(i * 7);
	guest_tcp(&p.g, GATEWAY_IP, 4000, port, 1001, seq, TCP_ACK | TCP_PSH, big, sizeof(big));
	while (got < sizeof(back) && readable(c, GUEST_WAIT_MS)) {
		ssize_t n = read(c, back + got, sizeof(back) - got);

		ck_assert_int_gt(n, 0);
		got += (size_t)n;
	}
	ck_assert(got == sizeof(big) && !memcmp(big, back, sizeof(big)));
	/* All of it comes back, and in segments far larger than an Ethernet frame. */
	ck_assert_int_eq(write(c, big, sizeof(big)), sizeof(big));
	for (size_t most = 0, n = got = 0; got < sizeof(big); got += n) {
		do
			ck_assert(guest_wait(&p.g, &r, IPPROTO_TCP, 4000, GUEST_WAIT_MS));
		while (!r.len || r.seq != seq + got);
		n = r.len;
		ck_assert(!memcmp(r.data, big + got, n));
		most = n > most ? n : most;
		guest_tcp(&p.g, GATEWAY_IP, 4000, port, 1001 + sizeof(big), r.seq + (uint32_t)n, TCP_ACK,
			NULL, 0);
		if (got + n == sizeof(big))
			ck_assert_uint_gt(most, 9000);
	}
	close(c);
	nat_stop(&p);
	close(s);
}
END_TEST

START_TEST(test_forward_reaches_the_guest_on_the_reported_port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct nat_process p;
	struct packet r;
	unsigned tcp, udp;
	int c = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int d = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	char buf[16];

	nat_start(&p, "forward tcp 127.0.0.1 0 22\nforward udp 127.0.0.1 0 53\n");
	ck_assert_msg(sscanf(p.answer, "ok %u %u", &tcp, &udp) == 2 && tcp && udp, "%s", p.answer);
	a.sin_port = htons((uint16_t)tcp);
	ck_assert(!connect(c, (struct sockaddr *)&a, sizeof(a)));
	ck_assert(guest_wait(&p.g, &r, IPPROTO_TCP, 22, GUEST_WAIT_MS) && r.flags == TCP_SYN);
	guest_tcp(&p.g, r.src, 22, r.sport, 500, r.seq + 1, TCP_SYN | TCP_ACK, NULL, 0);
	ck_assert(guest_wait(&p.g, &r, IPPROTO_TCP, 22, GUEST_WAIT_MS) && r.flags & TCP_ACK);
	guest_tcp(&p.g, r.src, 22, r.sport, 501, r.seq, TCP_ACK | TCP_PSH, "SSH-2.0", 7);
	ck_assert(readable(c, GUEST_WAIT_MS));
	ck_assert_int_eq(read(c, buf, sizeof(buf)), 7);
	ck_assert(!memcmp(buf, "SSH-2.0", 7));
	a.sin_port = htons((uint16_t)udp);
	ck_assert_int_eq(sendto(d, "query", 5, 0, (struct sockaddr *)&a, sizeof(a)), 5);
	ck_assert(guest_wait(&p.g, &r, IPPROTO_UDP, 53, GUEST_WAIT_MS));
	ck_assert(r.len == 5 && !memcmp(r.data, "query", 5));
	close(c);
	close(d);
	nat_stop(&p);
}
END_TEST

START_TEST(test_row49_hostile_fragments_and_ip_headers_are_survived)
{
	struct nat_process p;
	uint8_t pkt[2000] = { 0 };

	nat_start(&p, "host deny\n");
	for (int round = 0; round < 50; round++) {
		/* overlap, teardrop, past 64 KiB, a first fragment shorter than its header, no last one */
		guest_ip(&p.g, IPPROTO_UDP, GATEWAY_IP, 0x2000, pkt, 800);
		guest_ip(&p.g, IPPROTO_UDP, GATEWAY_IP, 0x2000 | 50, pkt, 800);
		guest_ip(&p.g, IPPROTO_UDP, GATEWAY_IP, 3, pkt, 4);
		guest_ip(&p.g, IPPROTO_UDP, GATEWAY_IP, 0x1fff, pkt, 1400);
		guest_ip(&p.g, IPPROTO_TCP, GATEWAY_IP, 0x2000, pkt, 8);
		guest_ip(&p.g, IPPROTO_ICMP, GATEWAY_IP, 0x2000, pkt, 1480);
		guest_ip(&p.g, IPPROTO_ICMP, GATEWAY_IP, 185, pkt, 1480);
		for (unsigned ihl = 0; ihl < 16; ihl++) {
			uint8_t ip[24] = { (uint8_t)(0x40 | ihl), 0, 0, 24, [9] = IPPROTO_UDP,
				[16] = 10, 0, 2, 2 };

			guest_eth(&p.g, 0x0800, ip, sizeof(ip));
		}
	}
	ck_assert(nat_alive(&p, GUEST_WAIT_MS));
	nat_stop(&p);
}
END_TEST

START_TEST(test_fragments_in_order_make_one_datagram)
{
	static uint8_t udp[8 + 4000], buf[5000];
	struct nat_process p;
	uint16_t port;
	int s = listener(SOCK_DGRAM, &port);

	nat_start(&p, "host allow\n");
	memset(udp, 'y', sizeof(udp));
	memcpy(udp, (uint8_t[]){ 0x12, 0x34, (uint8_t)(port >> 8), (uint8_t)port, sizeof(udp) >> 8,
		sizeof(udp) & 0xff, 0, 0 }, 8);         /* no checksum */
	guest_ip(&p.g, IPPROTO_UDP, GATEWAY_IP, 0x2000, udp, 1480);
	guest_ip(&p.g, IPPROTO_UDP, GATEWAY_IP, 0x2000 | 1480 / 8, udp + 1480, 1480);
	guest_ip(&p.g, IPPROTO_UDP, GATEWAY_IP, 2960 / 8, udp + 2960, sizeof(udp) - 2960);
	ck_assert(readable(s, GUEST_WAIT_MS));
	ck_assert_int_eq(recv(s, buf, sizeof(buf), 0), 4000);
	ck_assert(!memcmp(buf, udp + 8, 4000));
	nat_stop(&p);
	close(s);
}
END_TEST

START_TEST(test_row50_short_dhcp_tftp_and_udp_are_survived)
{
	struct nat_process p;
	uint8_t pkt[600] = { 1, 1, 6 };

	nat_start(&p, "host deny\n");
	for (size_t len = 0; len < sizeof(pkt); len++) {
		guest_udp(&p.g, GATEWAY_IP, 68, 67, pkt, len);
		guest_udp(&p.g, GATEWAY_IP, 1069, 69, pkt, len);
		if (len < 8)
			guest_ip(&p.g, IPPROTO_UDP, GATEWAY_IP, 0, pkt, len);
	}
	ck_assert(nat_alive(&p, GUEST_WAIT_MS));
	ck_assert_uint_ne(guest_dhcp(&p.g), 0);
	nat_stop(&p);
}
END_TEST

START_TEST(test_row51_short_arp_ncsi_and_urgent_tcp_are_survived)
{
	struct nat_process p;
	uint8_t pkt[200] = { 0, 1, 8, 0, 6, 4, 0, 1 };
	uint8_t tcp[60] = { 0x12, 0x34, 0, 21, [12] = 0x50, [13] = 0x38, [18] = 0xff, 0xff };

	nat_start(&p, "host deny\n");
	for (size_t len = 0; len < sizeof(pkt); len++) {
		guest_eth(&p.g, 0x0806, pkt, len);
		guest_eth(&p.g, 0x88f8, pkt, len);
		if (len < sizeof(tcp))
			guest_ip(&p.g, IPPROTO_TCP, 0xc0000201, 0, tcp, len);
	}
	for (unsigned off = 0; off < 16; off++) {
		tcp[12] = (uint8_t)(off << 4);
		guest_ip(&p.g, IPPROTO_TCP, GATEWAY_IP, 0, tcp, sizeof(tcp));
	}
	ck_assert(nat_alive(&p, GUEST_WAIT_MS));
	nat_stop(&p);
}
END_TEST

START_TEST(test_seeded_garbage_and_oversized_frames_are_survived)
{
	static uint8_t f[66000];
	struct nat_process p;
	uint64_t x = 42;

	nat_start(&p, "host deny\n");
	for (unsigned i = 0; i < 20000; i++) {
		static const uint16_t types[] = { 0x0800, 0x0800, 0x0806, 0x86dd };
		size_t len;

		for (size_t k = 0; k < 160; k++) {
			x = x * 6364136223846793005ull + 1442695040888963407ull;
			f[k] = (uint8_t)(x >> 56);
		}
		len = 1 + (x >> 33) % 160;
		f[12] = (uint8_t)(types[i & 3] >> 8);
		f[13] = (uint8_t)types[i & 3];
		if (i & 3 && len > 40 && f[13] == 0) {  /* headers that look right */
			static const uint8_t to[] = { 10, 0, 2, 2 };

			f[14] = 0x45;
			f[16] = 0;
			f[17] = (uint8_t)(len - 14);
			f[20] &= 0x20;
			f[23] = i & 8 ? IPPROTO_UDP : i & 16 ? IPPROTO_TCP : IPPROTO_ICMP;
			memcpy(f + 30, to, 4);
		}
		guest_raw(&p.g, f, len);
	}
	guest_raw(&p.g, f, sizeof(f));
	ck_assert(nat_alive(&p, GUEST_WAIT_MS));
	nat_stop(&p);
}
END_TEST

START_TEST(test_row52_a_flood_of_flows_is_bounded_and_service_goes_on)
{
	struct nat_process p;
	uint16_t port;
	int s = listener(SOCK_DGRAM, &port);

	nat_start(&p, "host allow\n");
	for (unsigned i = 0; i < 12000; i++)
		guest_udp(&p.g, GATEWAY_IP, (uint16_t)(1024 + i), port, "x", 1);
	for (unsigned i = 0; i < 2000; i++)
		guest_tcp(&p.g, GATEWAY_IP, (uint16_t)(1024 + i), (uint16_t)(30000 + i), 1, 0, TCP_SYN,
			NULL, 0);
	ck_assert(nat_alive(&p, GUEST_WAIT_MS));        /* all of that is behind us */
	ck_assert(nat_alive(&p, 10000));
	nat_stop(&p);
	close(s);
}
END_TEST

START_TEST(test_row53_host_loopback_is_out_of_reach_by_default)
{
	static const uint32_t ways[] = { GATEWAY_IP, 0x7f000001, 0x7f123456, 0x00000000, 0xffffffff };
	struct nat_process p;
	struct packet r;
	uint16_t tcp, udp;
	int s = listener(SOCK_STREAM, &tcp), d = listener(SOCK_DGRAM, &udp);

	nat_start(&p, "host deny\n");
	for (unsigned i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
		guest_tcp(&p.g, ways[i], (uint16_t)(4001 + i), tcp, 1000, 0, TCP_SYN, NULL, 0);
		guest_udp(&p.g, ways[i], (uint16_t)(4001 + i), udp, "x", 1);
	}
	ck_assert(nat_alive(&p, GUEST_WAIT_MS));        /* it has seen them all */
	while (guest_next(&p.g, 0))
		;
	ck_assert(!readable(s, 0) && !readable(d, 0));
	/* The same words reach the server where that is allowed: the test is able to fail. */
	nat_stop(&p);
	nat_start(&p, "host allow\n");
	ck_assert(tcp_open(&p, GATEWAY_IP, tcp, &r, GUEST_WAIT_MS));
	ck_assert(readable(s, GUEST_WAIT_MS));
	guest_udp(&p.g, 0x7f000001, 4001, udp, "x", 1);
	ck_assert(readable(d, GUEST_WAIT_MS));
	nat_stop(&p);
	close(s);
	close(d);
}
END_TEST

static enum nat_verdict judge4(uint32_t dst, bool host_allowed)
{
	uint8_t f[14 + 28] = { [12] = 8, 0, 0x45, 0, 0, 28, [23] = IPPROTO_UDP, [39] = 8 };

	dst = htonl(dst);
	memcpy(f + 30, &dst, 4);
	return nat_filter(f, sizeof(f), host_allowed);
}

static enum nat_verdict judge6(const char *dst, bool host_allowed)
{
	uint8_t f[14 + 48] = { [12] = 0x86, 0xdd, 0x60, [19] = 8, IPPROTO_UDP, [59] = 8 };

	ck_assert_int_eq(inet_pton(AF_INET6, dst, f + 38), 1);
	return nat_filter(f, sizeof(f), host_allowed);
}

START_TEST(test_row53_link_local_and_metadata_addresses_are_forbidden)
{
	for (int host = 0; host < 2; host++) {
		ck_assert_int_eq(judge4(0xa9fea9fe, host), NAT_FORBIDDEN);
		ck_assert_int_eq(judge4(0x08080808, host), NAT_PASS);
		ck_assert_int_eq(judge4(0x7f000001, host), host ? NAT_PASS : NAT_FORBIDDEN);
		ck_assert_int_eq(judge4(0, host), host ? NAT_PASS : NAT_FORBIDDEN);
		ck_assert_int_eq(judge6("::1", host), host ? NAT_PASS : NAT_FORBIDDEN);
		ck_assert_int_eq(judge6("::", host), NAT_FORBIDDEN);
		ck_assert_int_eq(judge6("::ffff:127.0.0.1", host), NAT_FORBIDDEN);
		ck_assert_int_eq(judge6("::127.0.0.1", host), NAT_FORBIDDEN);
		ck_assert_int_eq(judge6("fe80::1", host), NAT_FORBIDDEN);
		ck_assert_int_eq(judge6("fd00:ec2::254", host), NAT_FORBIDDEN);
		ck_assert_int_eq(judge6("2001:db8::1", host), NAT_PASS);
		ck_assert_int_eq(judge6("fec0::2", host), NAT_PASS);
	}
}
END_TEST

START_TEST(test_row54_a_port_in_use_is_named_in_the_answer)
{
	struct nat_process p;
	char config[128];
	uint16_t tcp, udp;
	int s = listener(SOCK_STREAM, &tcp), d = listener(SOCK_DGRAM, &udp);

	snprintf(config, sizeof(config), "forward tcp 127.0.0.1 0 22\nforward tcp 127.0.0.1 %u 80\n",
		tcp);
	nat_start(&p, config);
	ck_assert_str_eq(p.answer, "error 1 Address already in use");
	nat_stop(&p);
	snprintf(config, sizeof(config), "forward udp 127.0.0.1 %u 80\n", udp);
	nat_start(&p, config);
	ck_assert_str_eq(p.answer, "error 0 Address already in use");
	nat_stop(&p);
	close(s);
	close(d);
}
END_TEST

START_TEST(test_configuration_that_is_not_understood_is_refused)
{
	static const char *const bad[] = { "nonsense\n", "mtu 70000\n", "mtu 5\n", "host maybe\n",
		"forward sctp 127.0.0.1 1 1\n", "forward tcp ::1 1 1\n", "forward tcp 127.0.0.1 1 0\n",
		"forward tcp 127.0.0.1 65536 1\n", "forward tcp 127.0.0.1 1 1 1\n" };
	struct nat_process p;

	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		nat_start(&p, bad[i]);
		ck_assert_msg(!strncmp(p.answer, "error -1 configuration", 22), "%s: %s", bad[i],
			p.answer);
		nat_stop(&p);
	}
}
END_TEST

/* A number of /proc/PID/FILE after KEY, in the given base; -1: not there. */
static long proc_number(int pid, const char *file, const char *key, int base)
{
	char path[64], line[256];
	long v = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
	f = fopen(path, "re");
	while (f && v < 0 && fgets(line, sizeof(line), f))
		if (!strncmp(line, key, strlen(key)))
			v = strtol(line + strlen(key), NULL, base);
	if (f)
		fclose(f);
	return v;
}

START_TEST(test_it_holds_no_privilege_and_little_memory)
{
	struct nat_process p;
	long clean, dirty;
	int pid;

	nat_start(&p, "host allow\n");
	ck_assert_uint_eq(guest_dhcp(&p.g), GUEST_IP);
	pid = nat_pid(&p);
	ck_assert_int_eq(proc_number(pid, "status", "CapEff:", 16), 0);
	ck_assert_int_eq(proc_number(pid, "status", "CapPrm:", 16), 0);
	ck_assert_int_eq(proc_number(pid, "status", "NoNewPrivs:", 10), 1);
	ck_assert_int_ne(proc_number(pid, "status", "Uid:", 10), 0);
#ifndef __SANITIZE_ADDRESS__
	ck_assert_int_eq(proc_number(pid, "status", "Seccomp:", 10), 2);
	clean = proc_number(pid, "smaps_rollup", "Private_Clean:", 10);
	dirty = proc_number(pid, "smaps_rollup", "Private_Dirty:", 10);
	printf("vmm-nat: private memory %ld KiB clean, %ld KiB dirty\n", clean, dirty);
	ck_assert(clean < 0 || clean + dirty <= 4096);  /* unreadable to other users: not dumpable */
#else
	(void)clean;
	(void)dirty;
#endif
	nat_stop(&p);
}
END_TEST

int main(void)
{
	char path[4096];
	Suite *s = suite_create("nat");
	TCase *t = tcase_create("nat");
	SRunner *r;
	int failed;

	if (!nat_helper(path, sizeof(path))) {
		printf("skipped: vmm-nat is not built (libslirp-dev, libglib2.0-dev)\n");
		return 77;
	}
	tcase_set_timeout(t, 240);
	tcase_add_test(t, test_arp_and_dhcp_give_the_guest_its_address);
	tcase_add_test(t, test_udp_echo_with_host_allowed);
	tcase_add_test(t, test_tcp_connect_and_a_large_segment_each_way);
	tcase_add_test(t, test_forward_reaches_the_guest_on_the_reported_port);
	tcase_add_test(t, test_row49_hostile_fragments_and_ip_headers_are_survived);
	tcase_add_test(t, test_fragments_in_order_make_one_datagram);
	tcase_add_test(t, test_row50_short_dhcp_tftp_and_udp_are_survived);
	tcase_add_test(t, test_row51_short_arp_ncsi_and_urgent_tcp_are_survived);
	tcase_add_test(t, test_seeded_garbage_and_oversized_frames_are_survived);
	tcase_add_test(t, test_row52_a_flood_of_flows_is_bounded_and_service_goes_on);
	tcase_add_test(t, test_row53_host_loopback_is_out_of_reach_by_default);
	tcase_add_test(t, test_row53_link_local_and_metadata_addresses_are_forbidden);
	tcase_add_test(t, test_row54_a_port_in_use_is_named_in_the_answer);
	tcase_add_test(t, test_configuration_that_is_not_understood_is_refused);
	tcase_add_test(t, test_it_holds_no_privilege_and_little_memory);
	suite_add_tcase(s, t);
	r = srunner_create(s);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
