// Updates the page by server-sent events. Each event holds one section of the page, rendered and escaped by the server.
"use strict";
(() => {
	const policy = window.trustedTypes?.createPolicy("echod", { createHTML: (html) => html });
	const link = document.getElementById("link");
	const search = document.getElementById("search");
	const query = () => "?" + new URLSearchParams(new FormData(search));
	let events, typing;

	function say(text, lost) {
		if (link.textContent !== text) link.textContent = text;
		link.className = lost ? "lost" : "";
	}

	function replace(event) {
		const html = JSON.parse(event.data);
		const parsed = new DOMParser().parseFromString(policy ? policy.createHTML(html) : html, "text/html");
		const fresh = parsed.body.firstElementChild;
		const old = document.getElementById(fresh.id);
		if (!old || held(old)) return;
		const left = [...old.querySelectorAll(".scroll")].map((e) => e.scrollLeft);
		old.replaceWith(fresh);
		fresh.querySelectorAll(".scroll").forEach((e, i) => { e.scrollLeft = left[i] || 0; });
	}

	// held reports whether a person is selecting text in an element or has the focus in it: it then stays as it is.
	function held(element) {
		const selection = document.getSelection();
		return element.contains(document.activeElement) ||
			(selection && !selection.isCollapsed && selection.containsNode(element, true));
	}

	function connect() {
		events?.close();
		events = new EventSource("/page/events" + query());
		events.onopen = () => say("Live");
		events.onerror = () => {
			say("No connection to the server since " + new Date().toLocaleTimeString() + ". Trying again.", true);
			if (events.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
		};
		events.addEventListener("section", replace);
		events.addEventListener("title", (event) => { document.title = JSON.parse(event.data); });
	}

	function searchAgain() {
		history.replaceState(null, "", "/" + query());
		connect();
	}
	search.addEventListener("submit", (event) => { event.preventDefault(); searchAgain(); });
	search.addEventListener("change", searchAgain);
	search.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(searchAgain, 300); });
	connect();
})();
