/* virtio-net on the mock driver: over a socket pair, and over the real NAT helper. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "mock_driver.h"
#include "nat_process.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/net.h"
#include "vmm/spawner.h"

extern const struct device_class net_class;

enum { RX, TX };
#define HDR 12u
#define BIT(b) (1ull << (b))

static struct mock *m;
static int peer;                /* the other end of the NIC's socket */

/* A NIC with these features accepted, on both engines in turn (_i). */
static void open_nic(const char *more, uint64_t want, int engine)
{
	char args[128];
	int pair[2];

	ck_assert(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	peer = pair[0];
	snprintf(args, sizeof(args), "fd,fd=%d%s", pair[1], more);
	m = mock_new(engine ? LOOP_EPOLL : LOOP_AUTO);
	mock_create(m, &net_class, args);
	mock_init(m, want);
}

static void close_nic(void)
{
	mock_free(m);
	close(peer);
}

static bool arrives(int ms)
{
	struct pollfd p = { peer, POLLIN };

	return poll(&p, 1, ms) == 1;
}

/* A transmit chain of header and frame; the header as given. */
static struct mock_buf tx_buf(const struct virtio_net_hdr_v1 *h, const void *frame, uint32_t len)
{
	struct mock_buf b = { mock_alloc(m, HDR + len), HDR + len };
	uint8_t *p = mock_at(m, b.at, b.len);

	memcpy(p, h, HDR);
	memcpy(p + HDR, frame, len);
	return b;
}

static void transmit(const struct virtio_net_hdr_v1 *h, const void *frame, uint32_t len)
{
	struct mock_buf b = tx_buf(h, frame, len);

	ck_assert_uint_eq(mock_request(m, TX, &b, 1, NULL, 0), 0);
}

static void give_rx(unsigned nr, uint32_t len, struct mock_buf *bufs)
{
	for (unsigned i = 0; i < nr; i++) {
		bufs[i] = (struct mock_buf){ mock_alloc(m, len), len };
		mock_add(m, RX, NULL, 0, &bufs[i], 1);
	}
	mock_kick(m, RX);
	mock_settle(m);
}

static uint64_t fact(const char *part, const char *key)
{
	struct facts *f = facts_new();
	char *text, *at;
	uint64_t v = 0;

	virtio_describe(mock_device(m), f);
	text = facts_text(f);
	at = strstr(text, part);
	at = at ? strstr(at, key) : NULL;
	ck_assert_msg(at != NULL, "%s", text);
	v = strtoull(strchr(at, ':') + 1, NULL, 10);
	free(text);
	facts_free(f);
	return v;
}

static const struct virtio_net_hdr_v1 plain;

START_TEST(test_config_says_mac_link_and_mtu)
{
	open_nic(",mac=02:00:00:00:00:2a,mtu=9000", ~0ull, _i);
	ck_assert_uint_eq(mock_config(m, 0, 4), 0x00000002);
	ck_assert_uint_eq(mock_config(m, 4, 2), 0x2a00);
	ck_assert_uint_eq(mock_config(m, 6, 2), VIRTIO_NET_S_LINK_UP);
	ck_assert_uint_eq(mock_config(m, 10, 2), 9000);
	close_nic();
}
END_TEST

START_TEST(test_options_that_make_no_sense_are_refused)
{
	static const char *const bad[] = { "bridge", "fd", "fd,fd=999", "fd,fd=2", "fd,fd=0,mtu=1",
		"user,mac=1", "user,mac=01:00:00:00:00:01", "user,mac=00:00:00:00:00:00",
		"user,mac=52:54:00:12:34:5g", "user,mac=52:54:00:12:34:567" };
	struct error err;

	m = mock_new(LOOP_EPOLL);
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		ck_assert_msg(mock_try_create(m, &net_class, bad[i], &err) < 0, "%s", bad[i]);
	mock_free(m);
}
END_TEST

START_TEST(test_frames_go_out_whole_and_in_order)
{
	uint8_t frame[1500], got[2000];

	open_nic("", ~0ull, _i);
	for (unsigned i = 0; i < 300; i++) {
		memset(frame, (int)i, sizeof(frame));
		transmit(&plain, frame, 14 + i);
		ck_assert(arrives(GUEST_WAIT_MS));
		ck_assert_int_eq(recv(peer, got, sizeof(got), 0), 14 + i);
		ck_assert(!memcmp(got, frame, 14 + i));
	}
	ck_assert_uint_eq(fact("sent", "frames"), 300);
	close_nic();
}
END_TEST

START_TEST(test_full_socket_holds_frames_back_and_loses_none)
{
	uint8_t frame[1000] = { 0 };
	unsigned done = 0, sent = 0;
	uint16_t head;
	uint32_t n;

	open_nic("", ~0ull, _i);
	for (unsigned round = 0; round < 8; round++) {
		while (sent < (round + 1) * 250) {
			struct mock_buf b;

			memcpy(frame, &sent, sizeof(sent));
			b = tx_buf(&plain, frame, sizeof(frame));
			mock_add(m, TX, &b, 1, NULL, 0);
			sent++;
		}
		mock_kick(m, TX);
		mock_settle(m);
		for (unsigned seq; done < sent; done++) {       /* the reader wakes up */
			ck_assert(arrives(GUEST_WAIT_MS));
			ck_assert_int_eq(recv(peer, frame, sizeof(frame), 0), sizeof(frame));
			memcpy(&seq, frame, sizeof(seq));
			ck_assert_uint_eq(seq, done);
		}
		for (unsigned i = 0; i < 250; i++)
			ck_assert(mock_wait(m, TX, &head, &n));
	}
	ck_assert_uint_eq(fact("sent", "dropped"), 0);
	close_nic();
}
END_TEST

/* The checksum a driver would have computed, the slow way. */
static unsigned slow_sum(const uint8_t *p, size_t len)
{
	uint32_t sum = 0;

	for (size_t i = 0; i < len; i++)
		sum += i & 1 ? p[i] : (uint32_t)p[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum & 0xffff;
}

START_TEST(test_partial_checksum_is_completed_over_any_layout)
{
	uint8_t frame[3000], want[3000], got[3000];
	unsigned seed = 7;

	open_nic("", ~0ull, 0);
	for (unsigned round = 0; round < 200; round++) {
		uint32_t len = 60 + (unsigned)rand_r(&seed) % 2000, cut;
		unsigned start = 14 + (unsigned)rand_r(&seed) % 40;
		struct virtio_net_hdr_v1 h = { .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
			.csum_start = (uint16_t)start, .csum_offset = (uint16_t)(rand_r(&seed) % 3 * 2) };
		struct mock_buf b, part[3];
		unsigned at = start + h.csum_offset, sum;

		for (uint32_t i = 0; i < len; i++)
			frame[i] = (uint8_t)rand_r(&seed);
		memcpy(want, frame, len);
		sum = slow_sum(want + start, len - start);
		sum = sum ? sum : 0xffff;
		want[at] = (uint8_t)(sum >> 8);
		want[at + 1] = (uint8_t)sum;
		b = tx_buf(&h, frame, len);
		cut = 1 + (unsigned)rand_r(&seed) % (len + HDR - 2);
		part[0] = (struct mock_buf){ b.at, cut };
		part[1] = (struct mock_buf){ b.at + cut, 1 };
		part[2] = (struct mock_buf){ b.at + cut + 1, len + HDR - cut - 1 };
		ck_assert_uint_eq(mock_request(m, TX, part, part[2].len ? 3 : 2, NULL, 0), 0);
		ck_assert(arrives(GUEST_WAIT_MS));
		ck_assert_int_eq(recv(peer, got, sizeof(got), 0), len);
		ck_assert_msg(!memcmp(got, want, len), "round %u", round);
		ck_assert(!memcmp((uint8_t *)mock_at(m, b.at, b.len) + HDR, frame, len));
	}
	close_nic();
}
END_TEST

START_TEST(test_received_frame_spans_merged_buffers)
{
	static uint8_t frame[5000], got[6000];
	struct mock_buf b[4];
	struct virtio_net_hdr_v1 h;
	uint32_t n, at = 0;
	uint16_t head;

	open_nic(",mtu=9000", ~0ull, _i);
	for (unsigned i = 0; i < sizeof(frame); i++)
		frame[i] = (uint8_t)(i * 13);
	ck_assert_int_eq(send(peer, frame, sizeof(frame), 0), sizeof(frame));
	give_rx(4, 1500, b);
	for (unsigned i = 0; i < 4; i++) {
		ck_assert(mock_wait(m, RX, &head, &n));
		ck_assert_uint_eq(n, i < 3 ? 1500 : sizeof(frame) + HDR - 4500);
		memcpy(got + at, mock_at(m, b[i].at, n), n);
		at += n;
	}
	memcpy(&h, got, HDR);
	ck_assert_uint_eq(h.num_buffers, 4);
	ck_assert_uint_eq(h.flags, VIRTIO_NET_HDR_F_DATA_VALID);
	ck_assert(!memcmp(got + HDR, frame, sizeof(frame)));
	close_nic();
}
END_TEST

START_TEST(test_without_merging_a_frame_takes_one_buffer_or_is_dropped)
{
	uint8_t frame[1600] = { 1 };
	struct virtio_net_hdr_v1 h;
	struct mock_buf b[2];
	uint32_t n;
	uint16_t head;

	open_nic("", ~(BIT(VIRTIO_NET_F_MRG_RXBUF) | BIT(VIRTIO_NET_F_GUEST_CSUM)), _i);
	ck_assert_int_eq(send(peer, frame, 1600, 0), 1600);
	ck_assert_int_eq(send(peer, frame, 1000, 0), 1000);
	give_rx(2, 1526, b);
	ck_assert(mock_wait(m, RX, &head, &n));
	ck_assert_uint_eq(n, HDR + 1000);
	memcpy(&h, mock_at(m, b[0].at, HDR), HDR);
	ck_assert(h.num_buffers == 1 && h.flags == 0);
	ck_assert_uint_eq(fact("received", "dropped"), 1);
	close_nic();
}
END_TEST

START_TEST(test_frames_wait_in_the_socket_until_there_are_buffers)
{
	uint8_t frame[100] = { 2 };
	struct mock_buf b[40];
	uint32_t n;
	uint16_t head;

	open_nic("", ~0ull, _i);
	for (unsigned i = 0; i < 40; i++)
		ck_assert_int_eq(send(peer, frame, sizeof(frame), 0), sizeof(frame));
	mock_settle(m);
	give_rx(40, 256, b);
	for (unsigned i = 0; i < 40; i++) {
		ck_assert(mock_wait(m, RX, &head, &n));
		ck_assert_uint_eq(n, HDR + sizeof(frame));
	}
	ck_assert_uint_eq(fact("received", "dropped"), 0);
	close_nic();
}
END_TEST

START_TEST(test_row44_chain_shorter_than_the_header_is_dropped_and_counted)
{
	struct mock_buf b;

	open_nic("", ~0ull, 0);
	for (uint32_t len = 1; len < HDR + 14; len++) {
		b = (struct mock_buf){ mock_alloc(m, len), len };
		ck_assert_uint_eq(mock_request(m, TX, &b, 1, NULL, 0), 0);
	}
	ck_assert_uint_eq(fact("sent", "invalid"), HDR + 13);
	ck_assert(!arrives(0));
	/* Nothing readable at all breaks the device. */
	b = (struct mock_buf){ mock_alloc(m, 64), 64 };
	mock_add(m, TX, NULL, 0, &b, 1);
	mock_kick(m, TX);
	mock_wait_broken(m);
	close_nic();
}
END_TEST

START_TEST(test_row45_bad_lengths_and_offsets_are_dropped_and_counted)
{
	static const struct virtio_net_hdr_v1 bad[] = {
		{ .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 100 },
		{ .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 99, .csum_offset = 0 },
		{ .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 65535, .csum_offset = 65535 },
		{ .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 14, .csum_offset = 85 },
		{ .gso_type = VIRTIO_NET_HDR_GSO_TCPV4, .gso_size = 1 },
		{ .gso_type = VIRTIO_NET_HDR_GSO_UDP },
		{ .gso_type = 0xff },
	};
	static uint8_t frame[70000];
	struct mock_buf b;
	uint64_t n = 0;

	open_nic("", ~0ull, 0);
	for (; n < sizeof(bad) / sizeof(bad[0]); n++)
		transmit(&bad[n], frame, 100);
	b = tx_buf(&plain, frame, sizeof(frame));
	ck_assert_uint_eq(mock_request(m, TX, &b, 1, NULL, 0), 0);
	ck_assert_uint_eq(fact("sent", "invalid"), n + 1);
	ck_assert(!arrives(0));
	/* The largest there is does pass. */
	transmit(&plain, frame, 65535 + 14);
	ck_assert(arrives(GUEST_WAIT_MS));
	close_nic();
	/* Without CSUM accepted no checksum can be asked for. */
	open_nic("", ~BIT(VIRTIO_NET_F_CSUM), 0);
	transmit(&(struct virtio_net_hdr_v1){ .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 14 },
		frame, 100);
	ck_assert_uint_eq(fact("sent", "invalid"), 1);
	close_nic();
}
END_TEST

START_TEST(test_row46_tiny_and_unwritable_receive_buffers_cost_frames_not_the_device)
{
	uint8_t frame[2000] = { 3 };
	struct mock_buf b[256], ro;
	uint32_t n;
	uint16_t head;

	open_nic("", ~0ull, 0);
	ck_assert_int_eq(send(peer, frame, sizeof(frame), 0), sizeof(frame));
	ro = (struct mock_buf){ mock_alloc(m, 64), 64 };
	mock_add(m, RX, &ro, 1, NULL, 0);
	mock_kick(m, RX);
	ck_assert(mock_wait(m, RX, &head, &n) && n == 0);
	give_rx(4, 1, b);
	for (unsigned i = 0; i < 4; i++)
		ck_assert(mock_wait(m, RX, &head, &n) && n == 0);
	ck_assert_uint_eq(fact("received", "invalid"), 5);
	/* Buffers of header size: 2000 bytes would need more of them than are ever held. */
	give_rx(128, 12, b);
	ck_assert_uint_eq(fact("received", "dropped"), 1);
	/* A frame that fits into many is delivered in many. */
	ck_assert_int_eq(send(peer, frame, 60, 0), 60);
	for (unsigned i = 0; i < 6; i++)
		ck_assert(mock_wait(m, RX, &head, &n) && n == 12);
	close_nic();
}
END_TEST

START_TEST(test_row47_frames_to_the_own_address_come_back_only_by_the_peer)
{
	uint8_t frame[64] = { 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x52, 0x54, 0, 0x12, 0x34, 0x56 };
	struct mock_buf b[64], t;
	uint8_t got[100];
	uint32_t n;
	uint16_t head;

	open_nic("", ~0ull, _i);
	give_rx(64, 256, b);
	for (unsigned i = 0; i < 64; i++) {
		t = tx_buf(&plain, frame, sizeof(frame));
		mock_add(m, TX, &t, 1, NULL, 0);
	}
	mock_kick(m, TX);
	for (unsigned i = 0; i < 64; i++) {
		ck_assert(mock_wait(m, TX, &head, &n));
		ck_assert(arrives(GUEST_WAIT_MS));
		ck_assert_int_eq(recv(peer, got, sizeof(got), 0), sizeof(frame));
	}
	ck_assert(!mock_used(m, RX, &head, &n));
	close_nic();
}
END_TEST

START_TEST(test_row48_no_control_queue_is_offered)
{
	open_nic("", ~0ull, 0);
	ck_assert(!(mock_offered(m) & BIT(VIRTIO_NET_F_CTRL_VQ)));
	mock_write(m, VIRTIO_MMIO_QUEUE_SEL, 2);
	ck_assert_uint_eq(mock_read(m, VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
	close_nic();
}
END_TEST

START_TEST(test_reset_with_buffers_held_and_frames_stuck_starts_clean)
{
	uint8_t frame[1000] = { 0 }, got[1000];
	struct mock_buf b[8];
	unsigned stuck = 0;
	uint32_t n;
	uint16_t head;

	open_nic("", ~0ull, _i);
	give_rx(8, 2048, b);
	for (unsigned i = 0; i < 250; i++) {
		struct mock_buf t = tx_buf(&plain, frame, sizeof(frame));

		mock_add(m, TX, &t, 1, NULL, 0);
	}
	mock_kick(m, TX);
	mock_settle(m);
	mock_init(m, ~0ull);
	while (arrives(0)) {
		ck_assert_int_eq(recv(peer, got, sizeof(got), 0), sizeof(frame));
		stuck++;
	}
	ck_assert_uint_le(stuck, 250);
	frame[0] = 9;
	transmit(&plain, frame, sizeof(frame));
	ck_assert(arrives(GUEST_WAIT_MS));
	ck_assert_int_eq(recv(peer, got, sizeof(got), 0), sizeof(frame));
	ck_assert_uint_eq(got[0], 9);
	give_rx(8, 2048, b);
	ck_assert_int_eq(send(peer, frame, 100, 0), 100);
	ck_assert(mock_wait(m, RX, &head, &n) && n == HDR + 100);
	close_nic();
}
END_TEST

START_TEST(test_closed_peer_costs_frames_not_the_device)
{
	uint8_t frame[100] = { 0 };
	struct mock_buf b[8];

	open_nic("", ~0ull, _i);
	give_rx(8, 2048, b);
	close(peer);
	mock_settle(m);
	for (unsigned i = 0; i < 10; i++)
		transmit(&plain, frame, sizeof(frame));
	ck_assert_uint_eq(fact("sent", "dropped"), 10);
	peer = -1;
	mock_free(m);
}
END_TEST

/* ---- the back end that starts vmm-nat -------------------------------------------------------------- */

static struct spawner *spawner;

static struct mock_buf held[64];        /* receive buffers of the NIC under test, oldest first */

static int open_user(const char *args, struct error *err)
{
	char path[4096];
	const char *const argv[] = { path, NULL };
	int r;

	ck_assert(nat_helper(path, sizeof(path)));
	ck_assert(!spawner_new(&spawner, err) && !spawner_add(spawner, argv, err));
	ck_assert(!spawner_seal(spawner, err));
	m = mock_new(LOOP_AUTO);
	mock_vm(m)->spawner = spawner;
	r = mock_try_create(m, &net_class, args, err);
	if (!r) {
		mock_init(m, ~0ull);
		give_rx(64, 2048, held);
	}
	return r;
}

static void close_user(void)
{
	mock_free(m);
	spawner_free(spawner);
}

/* The gateway answers ARP: from the driver through the ring to the helper and back. */
static void ask_gateway(void)
{
	static const uint8_t arp[] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0x12, 0x34,
		0x56, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 10, 0, 2, 15,
		0, 0, 0, 0, 0, 0, 10, 0, 2, 2 };
	bool found = false;
	uint32_t n;
	uint16_t head;

	transmit(&plain, arp, sizeof(arp));
	while (!found && mock_wait(m, RX, &head, &n)) {
		for (unsigned i = 0; i < 64 && !found; i++) {
			uint8_t *f = (uint8_t *)mock_at(m, held[i].at, held[i].len) + HDR;

			found = f[12] == 8 && f[13] == 6 && f[21] == 2;
			if (found)
				memset(f, 0, 64);       /* each answer counts once */
		}
	}
	ck_assert(found);
}

/* The pid of the one child of our spawner. */
/* The parent of a process, and its name; -1 if there is no such process. */
static int parent_of(int pid, char name[32])
{
	char path[64], line[256];
	int ppid = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	f = fopen(path, "re");
	if (f && (!fgets(line, sizeof(line), f) ||
			sscanf(line, "%*d (%31[^)]) %*c %d", name, &ppid) != 2))
		ppid = -1;
	if (f)
		fclose(f);
	return ppid;
}

/* Our own helper, a child of our spawner: other tests have theirs. */
static int helper_pid(void)
{
	char name[32], ignored[32];
	int best = -1;

	for (int pid = getpid(); pid < getpid() + 2000; pid++) {
		int ppid = parent_of(pid, name);

		if (ppid > 0 && !strcmp(name, "vmm-nat") && parent_of(ppid, ignored) == getpid())
			best = pid;
	}
	return best;
}

START_TEST(test_row54_bad_and_busy_forwards_are_refused_in_words)
{
	static const struct {
		const char *args, *words;
	} bad[] = { { "user,fwd=tcp:80", "expected tcp|udp:[HOST:]PORT:GUESTPORT" },
		{ "user,fwd=sctp:1:1", "expected" }, { "user,fwd=tcp:[::]:80:80", "IPv4" },
		{ "user,fwd=tcp:::80:80", "expected" }, { "user,fwd=tcp:1:0", "expected" },
		{ "user,fwd=tcp:1:65536", "expected" }, { "user,fwd=tcp:8080:1,fwd=tcp:8080:2", "twice" },
		{ "user,fwd=tcp:0.0.0.0:8080:1,hostfwd=tcp::8080-:2", "twice" },
		{ "user,hostfwd=tcp::8080-10.0.2.99:2", "expected" }, { "user,colour=red", "colour" },
		{ "user,mtu=70000", "must be 576 to 65520" }, { "user,host=maybe", "deny or allow" },
		{ "user,fwd=tcp:192.0.2.77:8080:1", "cannot listen on tcp port 192.0.2.77:8080" } };
	struct error err;

	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		ck_assert_msg(open_user(bad[i].args, &err) < 0, "%s", bad[i].args);
		ck_assert_msg(strstr(err.msg, bad[i].words) != NULL, "%s: %s", bad[i].args, err.msg);
		close_user();
	}
}
END_TEST

START_TEST(test_row55_killed_helper_takes_the_link_down_and_is_started_again)
{
	struct error err;
	uint64_t port;
	int pid, last = -1;

	ck_assert_msg(!open_user("user,fwd=tcp:0:22,hostfwd=udp::0-:53", &err), "%s", err.msg);
	port = fact("forwards", "\"port\"");
	ck_assert_uint_ne(port, 0);
	ask_gateway();
	for (unsigned i = 1; i <= 4; i++) {
		pid = helper_pid();
		ck_assert(pid > 0 && pid != last);
		last = pid;
		kill(pid, SIGKILL);
		mock_wait_config(m);            /* down; up may come with it, or later */
		for (unsigned ms = 0; fact("\"mac\"", "restarts") < i || !mock_config(m, 6, 2); ms++) {
			ck_assert_uint_lt(ms, MOCK_DEADLINE_MS);
			poll(NULL, 0, 1);
		}
		ask_gateway();
		ck_assert_uint_eq(fact("forwards", "\"port\""), port);
	}
	close_user();
}
END_TEST

START_TEST(test_machine_is_torn_down_while_the_helper_restarts)
{
	struct error err;

	for (unsigned i = 0; i < 5; i++) {
		ck_assert(!open_user("user", &err));
		ask_gateway();
		kill(helper_pid(), SIGKILL);
		close_user();
	}
}
END_TEST

START_TEST(test_prepare_registers_nothing_for_other_back_ends)
{
	struct error err;
	struct spawner *s;

	ck_assert(!spawner_new(&s, &err));
	ck_assert_int_eq(net_prepare(s, "fd,fd=3", &err), 0);
	ck_assert_int_lt(net_prepare(s, "bridge,fd=3", &err), 0);
	ck_assert(strstr(err.msg, "bridge") != NULL);
	ck_assert_int_eq(spawner_find(s, "vmm-nat"), -ENOENT);
	spawner_free(s);
}
END_TEST

int main(void)
{
	char path[4096];
	Suite *s = suite_create("net");
	TCase *t = tcase_create("net");
	SRunner *r;
	int failed;

	tcase_set_timeout(t, 240);
	tcase_add_loop_test(t, test_config_says_mac_link_and_mtu, 0, 2);
	tcase_add_test(t, test_options_that_make_no_sense_are_refused);
	tcase_add_loop_test(t, test_frames_go_out_whole_and_in_order, 0, 2);
	tcase_add_loop_test(t, test_full_socket_holds_frames_back_and_loses_none, 0, 2);
	tcase_add_test(t, test_partial_checksum_is_completed_over_any_layout);
	tcase_add_loop_test(t, test_received_frame_spans_merged_buffers, 0, 2);
	tcase_add_loop_test(t, test_without_merging_a_frame_takes_one_buffer_or_is_dropped, 0, 2);
	tcase_add_loop_test(t, test_frames_wait_in_the_socket_until_there_are_buffers, 0, 2);
	tcase_add_test(t, test_row44_chain_shorter_than_the_header_is_dropped_and_counted);
	tcase_add_test(t, test_row45_bad_lengths_and_offsets_are_dropped_and_counted);
	tcase_add_test(t, test_row46_tiny_and_unwritable_receive_buffers_cost_frames_not_the_device);
	tcase_add_loop_test(t, test_row47_frames_to_the_own_address_come_back_only_by_the_peer, 0, 2);
	tcase_add_test(t, test_row48_no_control_queue_is_offered);
	tcase_add_loop_test(t, test_reset_with_buffers_held_and_frames_stuck_starts_clean, 0, 2);
	tcase_add_loop_test(t, test_closed_peer_costs_frames_not_the_device, 0, 2);
	tcase_add_test(t, test_prepare_registers_nothing_for_other_back_ends);
	if (nat_helper(path, sizeof(path))) {
		tcase_add_test(t, test_row54_bad_and_busy_forwards_are_refused_in_words);
		tcase_add_test(t, test_row55_killed_helper_takes_the_link_down_and_is_started_again);
		tcase_add_test(t, test_machine_is_torn_down_while_the_helper_restarts);
	} else {
		printf("vmm-nat is not built: its back end is left out\n");
	}
	suite_add_tcase(s, t);
	r = srunner_create(s);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
