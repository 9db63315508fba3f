/* virtio-console: the single console, the ports and their control protocol, and drivers that break it. */
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/virtio_console.h>
#include "mock_driver.h"
#include "unit.h"
#include "vmm/chardev.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"

extern const struct device_class console_class;

#define RX(port) ((port) ? 2u + 2 * (port) : 0u)
#define TX(port) (RX(port) + 1)

/* The machine's: what a console says of a panic. */
static const char *panic;
static char panic_words[200];

void vm_panic_seen(struct vm *vm, const char *how)
{
	(void)vm;
	snprintf(panic_words, sizeof(panic_words), "%s", how);
	panic = panic_words;
}

void vm_panic_over(struct vm *vm)
{
	(void)vm;
}

static struct error err;
static int original;

/* "fd:N" needs both directions in one descriptor: a socket pair's end is that. */
static char spec[40];
static int host_end;

static const char *a_socket(void)
{
	int fd[2];

	ck_assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, fd));
	host_end = fd[0];
	snprintf(spec, sizeof(spec), "fd:%d", fd[1]);
	original = fd[1];
	return spec;
}

/* chardev_open() has its own duplicate: the original is not needed. */
static void close_original(void)
{
	close(original);
}

static void read_exactly(int fd, void *buf, size_t n)
{
	char *at = buf;

	while (n) {
		ssize_t r = read(fd, at, n);

		ck_assert_int_gt(r, 0);
		at += r;
		n -= (size_t)r;
	}
}

static struct mock_buf text(struct mock *m, const char *s)
{
	struct mock_buf b = { mock_alloc(m, (uint32_t)strlen(s)), (uint32_t)strlen(s) };

	memcpy(mock_at(m, b.at, b.len), s, b.len);
	return b;
}

/* --- one console --- */

static struct mock *one_console(enum loop_engine engine)
{
	struct mock *m = mock_new(engine);

	mock_create(m, &console_class, a_socket());
	close_original();
	ck_assert(!(mock_offered(m) & 1ull << VIRTIO_CONSOLE_F_MULTIPORT));
	return m;
}

static void check_one(enum loop_engine engine)
{
	struct mock *m = one_console(engine);
	struct mock_buf out[2], in;
	uint32_t written;
	uint16_t head;
	char buf[16];

	mock_init(m, ~0ull);
	out[0] = text(m, "hello ");
	out[1] = text(m, "world");
	ck_assert_uint_eq(mock_request(m, TX(0), out, 2, NULL, 0), 0);
	read_exactly(host_end, buf, 11);
	ck_assert_mem_eq(buf, "hello world", 11);

	in = (struct mock_buf){ mock_alloc(m, 4), 4 };
	mock_add(m, RX(0), NULL, 0, &in, 1);
	mock_kick(m, RX(0));
	ck_assert_int_eq(write(host_end, "abcdef", 6), 6);
	ck_assert(mock_wait(m, RX(0), &head, &written));
	ck_assert_uint_eq(written, 4);
	ck_assert_mem_eq(mock_at(m, in.at, 4), "abcd", 4);
	ck_assert_uint_eq(mock_request(m, RX(0), NULL, 0, &in, 1), 2);  /* the rest was kept */
	ck_assert_mem_eq(mock_at(m, in.at, 2), "ef", 2);
	mock_free(m);
	close(host_end);
}

START_TEST(test_single_console_carries_bytes_both_ways)
{
	check_one(LOOP_URING);
	check_one(LOOP_EPOLL);
}
END_TEST

START_TEST(test_input_before_the_driver_waits_at_the_host)
{
	struct mock *m = one_console(LOOP_AUTO);
	struct mock_buf in;

	ck_assert_int_eq(write(host_end, "early", 5), 5);
	mock_init(m, ~0ull);
	in = (struct mock_buf){ mock_alloc(m, 64), 64 };
	ck_assert_uint_eq(mock_request(m, RX(0), NULL, 0, &in, 1), 5);
	ck_assert_mem_eq(mock_at(m, in.at, 5), "early", 5);
	mock_free(m);
	close(host_end);
}
END_TEST

START_TEST(test_panic_on_hvc0_is_recognised)
{
	struct mock *m = one_console(LOOP_AUTO);
	struct mock_buf out;

	panic = NULL;
	mock_init(m, ~0ull);
	out = text(m, "[    1.0] Kernel panic - not syncing: no init\n");
	mock_request(m, TX(0), &out, 1, NULL, 0);
	ck_assert(panic && !strncmp(panic, "hvc0: ", 6));
	mock_free(m);
	close(host_end);
}
END_TEST

START_TEST(test_emergency_write_needs_no_queue)
{
	struct mock *m = one_console(LOOP_AUTO);
	char buf[2];

	ck_assert(mock_offered(m) & 1ull << VIRTIO_CONSOLE_F_EMERG_WRITE);
	mock_config_write(m, offsetof(struct virtio_console_config, emerg_wr), 4, 'O');
	mock_config_write(m, 0, 4, 'x');                /* the rest is read-only */
	mock_config_write(m, offsetof(struct virtio_console_config, emerg_wr), 4, 'K');
	read_exactly(host_end, buf, 2);
	ck_assert_mem_eq(buf, "OK", 2);
	ck_assert_uint_eq(mock_config(m, offsetof(struct virtio_console_config, max_nr_ports), 4), 1);
	mock_free(m);
	close(host_end);
}
END_TEST

START_TEST(test_row24_reset_with_input_waiting_and_again)
{
	struct mock *m = one_console(LOOP_AUTO);
	struct mock_buf out;
	char c;

	for (unsigned i = 0; i < 50; i++) {
		mock_init(m, ~0ull);
		ck_assert_int_eq(write(host_end, "stale", 5), 5);
		out = text(m, "y");
		mock_add(m, TX(0), &out, 1, NULL, 0);
		mock_kick(m, TX(0));
		mock_reset(m);
	}
	mock_init(m, ~0ull);
	mock_request(m, TX(0), &out, 1, NULL, 0);
	read_exactly(host_end, &c, 1);
	ck_assert_int_eq(c, 'y');
	mock_free(m);
	close(host_end);
}
END_TEST

START_TEST(test_row38_output_with_device_writable_room_and_input_without)
{
	struct mock *m = one_console(LOOP_AUTO);
	struct mock_buf out, in;
	char buf[2];

	mock_init(m, ~0ull);
	out = text(m, "ok");
	in = (struct mock_buf){ mock_alloc(m, 8), 8 };
	ck_assert_uint_eq(mock_request(m, TX(0), &out, 1, &in, 1), 0);
	read_exactly(host_end, buf, 2);
	ck_assert_int_eq(write(host_end, "zz", 2), 2);
	ck_assert_uint_eq(mock_request(m, RX(0), &out, 1, NULL, 0), 0); /* no room: comes back empty */
	ck_assert_uint_eq(mock_request(m, RX(0), NULL, 0, &in, 1), 2);
	mock_free(m);
	close(host_end);
}
END_TEST

/* 64 chains of 16 descriptors, all of them the same megabyte: 1 GiB that nobody reads. */
START_TEST(test_row56_flood_of_huge_chains_is_cut)
{
	struct mock *m = mock_new(LOOP_AUTO);
	struct mock_buf big[16];
	struct facts *f = facts_new();
	struct virtio *v = mock_create(m, &console_class, a_socket());
	uint32_t written;
	uint16_t head;
	char *said;

	close_original();
	mock_init(m, ~0ull);
	for (unsigned i = 0; i < ARRAY_LEN(big); i++)
		big[i] = (struct mock_buf){ i ? big[0].at : mock_alloc(m, 1 << 20), 1 << 20 };
	mock_indirect(m, true);
	for (unsigned i = 0; i < 64; i++)
		mock_add(m, TX(0), big, ARRAY_LEN(big), NULL, 0);
	mock_kick(m, TX(0));
	for (unsigned i = 0; i < 64; i++)
		ck_assert(mock_wait(m, TX(0), &head, &written));
	v->ops->facts(v, f);
	said = facts_text(f);
	ck_assert_msg(strstr(said, "\"bytes_cut\":1006632960") != NULL, "%s", said);
	free(said);
	facts_free(f);
	mock_free(m);
	close(host_end);
}
END_TEST

/* --- ports --- */

static char agent_spec[80];
static struct device_spec specs[] = { { "console", "--console", agent_spec },
	{ "console", "--console", "null" }, { "rng", "--rng", "" }, { "console", "--console", "null" } };
static struct vm_config ports_cfg = { .machine = MACHINE_MICROVM, .devices = specs,
	.nr_devices = ARRAY_LEN(specs) };

/* Port 0: null; port 1: "agent" on a socket; port 2: a second console. */
static struct mock *three_ports(void)
{
	struct mock *m = mock_new(LOOP_AUTO);

	mock_vm(m)->cfg = &ports_cfg;
	snprintf(agent_spec, sizeof(agent_spec), "%s,name=agent", a_socket());
	for (unsigned i = 0; i < ARRAY_LEN(specs); i++)
		if (i != 2)
			mock_create(m, &console_class, specs[i].args);
	close_original();
	ck_assert_uint_eq(mock_vm(m)->nr_virtio, 1);
	ck_assert_uint_eq(mock_config(m, offsetof(struct virtio_console_config, max_nr_ports), 4), 3);
	return m;
}

static void tell(struct mock *m, uint32_t id, uint16_t event, uint16_t value)
{
	struct mock_buf b = { mock_alloc(m, 8), 8 };
	struct virtio_console_control h = { htole32(id), htole16(event), htole16(value) };

	memcpy(mock_at(m, b.at, 8), &h, 8);
	ck_assert_uint_eq(mock_request(m, 3, &b, 1, NULL, 0), 0);
}

/* The next control message; what follows its header in rest. */
static void hear(struct mock *m, uint32_t id, uint16_t event, uint16_t value, const char *rest)
{
	struct mock_buf b = { mock_alloc(m, 100), 100 };
	struct virtio_console_control h;
	uint32_t n = mock_request(m, 2, NULL, 0, &b, 1);

	memcpy(&h, mock_at(m, b.at, 8), 8);
	ck_assert_uint_eq(le32toh(h.id), id);
	ck_assert_uint_eq(le16toh(h.event), event);
	ck_assert_uint_eq(le16toh(h.value), value);
	ck_assert_uint_eq(n, 8 + strlen(rest));
	ck_assert_mem_eq(mock_at(m, b.at + 8, (uint32_t)strlen(rest) + 1), rest, strlen(rest));
}

#define NO_SIZE (~(1ull << VIRTIO_CONSOLE_F_SIZE))

static void bring_up(struct mock *m)
{
	ck_assert(mock_init(m, NO_SIZE) & 1ull << VIRTIO_CONSOLE_F_MULTIPORT);
	tell(m, 0, VIRTIO_CONSOLE_DEVICE_READY, 1);
	for (uint32_t i = 0; i < 3; i++)
		hear(m, i, VIRTIO_CONSOLE_PORT_ADD, 0, "");
	for (uint32_t i = 0; i < 3; i++)
		tell(m, i, VIRTIO_CONSOLE_PORT_READY, 1);
	hear(m, 0, VIRTIO_CONSOLE_CONSOLE_PORT, 1, "");
	hear(m, 0, VIRTIO_CONSOLE_PORT_OPEN, 1, "");
	hear(m, 1, VIRTIO_CONSOLE_PORT_NAME, 1, "agent");
	hear(m, 1, VIRTIO_CONSOLE_PORT_OPEN, 1, "");
	hear(m, 2, VIRTIO_CONSOLE_CONSOLE_PORT, 1, "");
	hear(m, 2, VIRTIO_CONSOLE_PORT_OPEN, 1, "");
}

START_TEST(test_ports_are_announced_named_and_opened)
{
	struct mock *m = three_ports();
	struct mock_buf out, in;
	uint32_t written;
	uint16_t head;
	char buf[4];

	bring_up(m);
	out = text(m, "ping");
	mock_request(m, TX(1), &out, 1, NULL, 0);
	read_exactly(host_end, buf, 4);
	ck_assert_mem_eq(buf, "ping", 4);
	in = (struct mock_buf){ mock_alloc(m, 64), 64 };
	mock_add(m, RX(1), NULL, 0, &in, 1);
	mock_kick(m, RX(1));
	ck_assert_int_eq(write(host_end, "pong", 4), 4);
	mock_settle(m);
	ck_assert(!mock_used(m, RX(1), &head, &written));       /* the guest has not opened it */
	tell(m, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
	ck_assert(mock_wait(m, RX(1), &head, &written));
	ck_assert_uint_eq(written, 4);
	mock_free(m);
	close(host_end);
}
END_TEST

START_TEST(test_driver_without_multiport_gets_port_zero)
{
	struct mock *m = three_ports();
	struct mock_buf out;

	mock_init(m, ~(1ull << VIRTIO_CONSOLE_F_MULTIPORT));
	out = text(m, "x");
	ck_assert_uint_eq(mock_request(m, TX(0), &out, 1, NULL, 0), 0);
	tell(m, 0, VIRTIO_CONSOLE_DEVICE_READY, 1);     /* not negotiated: taken and ignored */
	mock_free(m);
	close(host_end);
}
END_TEST

START_TEST(test_client_of_a_named_port_comes_and_goes)
{
	char path[] = "/tmp/test_console.XXXXXX", args[80];
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	struct mock *m = mock_new(LOOP_AUTO);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	ck_assert(mkdtemp(path) != NULL);
	snprintf(a.sun_path, sizeof(a.sun_path), "%s/sock", path);
	snprintf(args, sizeof(args), "unix:%s/sock,name=x", path);
	mock_create(m, &console_class, args);
	mock_init(m, NO_SIZE);
	tell(m, 0, VIRTIO_CONSOLE_DEVICE_READY, 1);
	hear(m, 1, VIRTIO_CONSOLE_PORT_ADD, 0, "");     /* port 0 is a console's, and there is none */
	tell(m, 1, VIRTIO_CONSOLE_PORT_READY, 1);
	hear(m, 1, VIRTIO_CONSOLE_PORT_NAME, 1, "x");
	hear(m, 1, VIRTIO_CONSOLE_PORT_OPEN, 0, "");
	tell(m, 1, VIRTIO_CONSOLE_PORT_OPEN, 1);
	ck_assert(!connect(fd, (struct sockaddr *)&a, sizeof(a)));
	hear(m, 1, VIRTIO_CONSOLE_PORT_OPEN, 1, "");
	close(fd);
	hear(m, 1, VIRTIO_CONSOLE_PORT_OPEN, 0, "");
	mock_free(m);
	unlink(a.sun_path);
	rmdir(path);
}
END_TEST

START_TEST(test_row48_senseless_control_messages_are_ignored)
{
	static const uint32_t ids[] = { 0, 1, 3, 15, 16, 17, 0x7fffffff, 0x80000000, 0xffffffff };
	struct mock *m = three_ports();
	struct mock_buf b, in;
	uint32_t written;
	uint16_t head;

	bring_up(m);
	for (unsigned i = 2; i < ARRAY_LEN(ids); i++)
		for (uint16_t event = 0; event < 10; event++)
			if (event != VIRTIO_CONSOLE_DEVICE_READY)
				tell(m, ids[i], event, 1);
	for (uint16_t event = 8; event < 200; event++)
		tell(m, 1, event, 0xffff);
	b = (struct mock_buf){ mock_alloc(m, 64), 7 };          /* shorter than a header */
	ck_assert_uint_eq(mock_request(m, 3, &b, 1, NULL, 0), 0);
	for (unsigned i = 0; i < 1000; i++)                     /* asks, and does not listen */
		tell(m, 0, VIRTIO_CONSOLE_DEVICE_READY, 1);
	hear(m, 0, VIRTIO_CONSOLE_PORT_ADD, 0, "");
	hear(m, 1, VIRTIO_CONSOLE_PORT_ADD, 0, "");
	in = (struct mock_buf){ mock_alloc(m, 64), 3 };         /* too small: cut, not overrun */
	ck_assert_uint_eq(mock_request(m, 2, NULL, 0, &in, 1), 3);
	in.len = 64;
	mock_add(m, 2, NULL, 0, &in, 1);
	mock_kick(m, 2);
	mock_settle(m);
	ck_assert(!mock_used(m, 2, &head, &written));           /* and that was all */
	ck_assert(!(mock_status(m) & VIRTIO_CONFIG_S_NEEDS_RESET));
	mock_free(m);
	close(host_end);
}
END_TEST

/* --- the command line --- */

START_TEST(test_row89_bad_arguments_are_refused)
{
	static const struct {
		const char *args;
		int code;
	} t[] = { { "", EINVAL }, { "name=x", EINVAL }, { "null,nmae=x", EINVAL }, { "null,name=", EINVAL },
		{ "null,name=a/b", EINVAL }, { "null,name=a b", EINVAL }, { "nosuch", EINVAL },
		{ "null,name=0123456789012345678901234567890123456789012345678901234567890123", EINVAL } };

	for (unsigned i = 0; i < ARRAY_LEN(t); i++) {
		struct mock *m = mock_new(LOOP_EPOLL);

		ck_assert_msg(mock_try_create(m, &console_class, t[i].args, &err) == -t[i].code, "'%s': %s",
			t[i].args, err.msg);
		ck_assert_msg(strstr(err.msg, "--device") != NULL, "%s", err.msg);
		mock_free(m);
	}
}
END_TEST

START_TEST(test_row89_names_are_unique_and_ports_are_counted)
{
	static struct device_spec many[17];
	struct vm_config cfg = { .devices = many, .nr_devices = 2 };
	struct mock *m = mock_new(LOOP_EPOLL);

	for (unsigned i = 0; i < ARRAY_LEN(many); i++)
		many[i] = (struct device_spec){ "console", "--console", "null,name=a" };
	mock_vm(m)->cfg = &cfg;
	mock_create(m, &console_class, "null,name=a");
	ck_assert_int_eq(mock_try_create(m, &console_class, "null,name=a", &err), -EEXIST);
	mock_free(m);
	m = mock_new(LOOP_EPOLL);
	cfg.nr_devices = 17;
	mock_vm(m)->cfg = &cfg;
	ck_assert_int_eq(mock_try_create(m, &console_class, "null,name=a", &err), -EINVAL);
	mock_free(m);
}
END_TEST

UNIT_MAIN("console", test_single_console_carries_bytes_both_ways,
	test_input_before_the_driver_waits_at_the_host, test_panic_on_hvc0_is_recognised, test_emergency_write_needs_no_queue,
	test_row24_reset_with_input_waiting_and_again,
	test_row38_output_with_device_writable_room_and_input_without,
	test_row56_flood_of_huge_chains_is_cut, test_ports_are_announced_named_and_opened,
	test_driver_without_multiport_gets_port_zero, test_client_of_a_named_port_comes_and_goes,
	test_row48_senseless_control_messages_are_ignored, test_row89_bad_arguments_are_refused,
	test_row89_names_are_unique_and_ports_are_counted)
