#ifndef NAT_CONFIG_H
#define NAT_CONFIG_H
/*
 * What the NAT helper is told on its control socket: one message of text lines, at most NAT_TEXT_MAX bytes.
 *
 *	mtu 65520
 *	host deny                        may the guest reach the host's loopback? allow or deny
 *	forward tcp 127.0.0.1 8080 22    protocol, host address, host port (0: any free one), guest port
 *
 * It answers with one message: "ok", then " PORT" for each forward in order, or "error N WORDS", N being
 * the number of the forward that failed, or -1. Then it closes the control socket.
 */
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NAT_FRAME_FD    3       /* SOCK_SEQPACKET, one Ethernet frame a message */
#define NAT_CONTROL_FD  4
#define NAT_TEXT_MAX    4096
#define NAT_FORWARDS    32
#define NAT_MTU_MIN     576
#define NAT_MTU_MAX     65520   /* libslirp takes 65521; an even size keeps payloads aligned */

struct nat_forward {
	bool udp;
	struct in_addr host;
	uint16_t port, guest_port;      /* host order */
};

struct nat_config {
	unsigned mtu;
	bool host_allowed;
	struct nat_forward forward[NAT_FORWARDS];
	unsigned nr_forwards;
};

/* 0, or -EINVAL if a line is not one of the above. text is NUL-terminated and is cut up. */
int nat_config_parse(struct nat_config *c, char *text);
/* The text of a configuration; -ENOSPC if it does not fit. */
int nat_config_print(const struct nat_config *c, char *buf, size_t len);
#endif
