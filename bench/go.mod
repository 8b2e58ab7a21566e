module echod/bench

go 1.26.0

require (
	fortio.org/fortio v1.66.0
	github.com/HdrHistogram/hdrhistogram-go v1.4.0
	github.com/cloudwego/netpoll v0.7.2
	github.com/lesismal/nbio v1.6.9
	github.com/maurice2k/tcpserver v1.2.0
	github.com/panjf2000/gnet/v2 v2.10.0
	github.com/tidwall/evio v1.0.8
	golang.org/x/sys v0.49.0
	gonum.org/v1/plot v0.16.0
)
