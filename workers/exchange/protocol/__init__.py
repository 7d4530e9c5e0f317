"""The protocol: requests, logins, limits and the faults on request, without sockets and clock."""
