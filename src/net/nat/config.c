#include "net/nat/config.h"
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

static bool parse_forward(struct nat_config *c, const char *line)
{
	struct nat_forward *f = &c->forward[c->nr_forwards];
	unsigned port, guest_port;
	char proto[4], host[INET_ADDRSTRLEN];
	int used = 0;

	if (c->nr_forwards == NAT_FORWARDS ||
		sscanf(line, "%3s %15s %5u %5u%n", proto, host, &port, &guest_port, &used) != 4 ||
		line[used])
		return false;
	f->udp = !strcmp(proto, "udp");
	if ((!f->udp && strcmp(proto, "tcp")) || inet_pton(AF_INET, host, &f->host) != 1 ||
		port > 65535 || guest_port > 65535 || !guest_port)
		return false;
	f->port = (uint16_t)port;
	f->guest_port = (uint16_t)guest_port;
	c->nr_forwards++;
	return true;
}

static bool parse_line(struct nat_config *c, const char *line)
{
	int used = 0;

	if (!strcmp(line, "host allow") || !strcmp(line, "host deny")) {
		c->host_allowed = line[5] == 'a';
		return true;
	}
	if (sscanf(line, "mtu %5u%n", &c->mtu, &used) == 1)
		return !line[used] && c->mtu >= NAT_MTU_MIN && c->mtu <= NAT_MTU_MAX;
	return !strncmp(line, "forward ", 8) && parse_forward(c, line + 8);
}

int nat_config_parse(struct nat_config *c, char *text)
{
	char *save, *line;

	*c = (struct nat_config){ .mtu = NAT_MTU_MAX };
	for (line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
		if (!parse_line(c, line))
			return -EINVAL;
	return 0;
}

int nat_config_print(const struct nat_config *c, char *buf, size_t len)
{
	int n = snprintf(buf, len, "mtu %u\nhost %s\n", c->mtu, c->host_allowed ? "allow" : "deny");

	for (unsigned i = 0; n > 0 && (size_t)n < len && i < c->nr_forwards; i++) {
		const struct nat_forward *f = &c->forward[i];
		char host[INET_ADDRSTRLEN];

		inet_ntop(AF_INET, &f->host, host, sizeof(host));
		n += snprintf(buf + n, len - (size_t)n, "forward %s %s %u %u\n",
			f->udp ? "udp" : "tcp", host, f->port, f->guest_port);
	}
	return n > 0 && (size_t)n < len ? 0 : -ENOSPC;
}
