/* The list of videos, the filters, the player, and the keys. */
function showVideos() {
  const state = { video: DATA.videos[0], label: null, kinds: new Set(DATA.kinds), score: Math.min(...DATA.models.map((model) => (model.score < 1 ? model.score : 0))), from: 0, to: 1, chosen: null, sort: "errors", text: "" };
  const files = new Map();
  const place = h("div", { id: "timeline" }), detail = h("div", { class: "detail", "aria-live": "polite", id: "detail" }), heading = h("h3", { id: "videoname" }), player = h("div", { id: "player" });
  const list = h("ul", { class: "list", id: "videolist" });
  let current = null, element = null;

  const worth = (event) => event.score >= 1000 * state.score - 0.5 && (state.label === null || event.label === state.label) && state.kinds.has(event.kind);
  const missing = (event) => state.kinds.has("missed") && (state.label === null || event.label === state.label) && event.missed.some(Boolean);
  /* Errors of a video that the filters let through, by model. */
  function errors(video) {
    unpack(video);
    return video.predicted.map((events, m) => events.filter((event) => worth(event) && event.kind !== "right").length +
      video.annotated.filter((event) => missing(event) && event.missed[m]).length);
  }
  const any = (video) => unpack(video).predicted.some((events) => events.some(worth)) || video.annotated.some((event) => missing(event) || (state.label === event.label && state.kinds.has("right")));

  function drawList() {
    const found = DATA.videos.filter((video) => any(video) && video.id.toLowerCase().includes(state.text)).map((video) => [video, errors(video)]);
    const sum = (counts) => counts.reduce((a, b) => a + b, 0);
    if (state.sort === "errors") found.sort((a, b) => sum(b[1]) - sum(a[1]));
    list.replaceChildren(...found.map(([video, counts]) => h("li", {}, h("button", { "aria-current": video === state.video ? "true" : null, "data-id": video.id, title: video.id, onclick: () => open(video) },
      h("span", {}, video.id), h("span", { class: "count", title: "errors" }, TWO ? counts.map((count, m) => `${LETTERS[m]} ${count}`).join(" · ") : String(counts[0]))))));
    document.getElementById("listed").textContent = `${found.length} of ${DATA.videos.length} videos; number of errors at right`;
  }

  function draw() {
    const focused = document.activeElement === (current && current.drawing);
    current = timeline(state.video, Math.max(place.clientWidth, 300), { from: state.from, to: state.to, label: state.label }, worth, state.chosen, choose);
    place.replaceChildren(current.drawing);
    if (focused) current.drawing.focus({ preventScroll: true });
    listen(current.drawing);
    detail.textContent = state.chosen ? describe(state.chosen) : "Choose an event to see what it is.";
    if (element) current.playhead(100 * element.currentTime);
  }

  function open(video) {
    Object.assign(state, { video, from: 0, to: video.duration, chosen: null });
    heading.textContent = `${video.id}, ${seconds(video.duration, 1)} s`;
    list.querySelectorAll("button").forEach((button) => (button.dataset.id === video.id ? button.setAttribute("aria-current", "true") : button.removeAttribute("aria-current")));
    openPlayer(files.get(video.id) || video.media);
    draw();
  }

  function openPlayer(address) {
    element = null;
    const choose = h("input", { type: "file", accept: "video/*,audio/*", onchange: () => {
      const url = URL.createObjectURL(choose.files[0]);
      files.set(state.video.id, url);
      openPlayer(url);
    } });
    if (address) {
      // A player that was taken out of the page may still have events under way.
      const own = h("video", { class: "player", src: address, controls: true, preload: "metadata", ontimeupdate: () => own === element && current && current.playhead(100 * own.currentTime) });
      own.addEventListener("error", () => own === element && player.append(h("p", { class: "soft" }, `The file ${address} can't be played here.`)));
      element = own;
    }
    player.replaceChildren(...(element ? [element] : [h("label", { class: "screen soft file" }, "Video file of this clip, to play beside the timeline: ", choose)]));
  }

  function choose(event) {
    state.chosen = event;
    if (element) {
      element.currentTime = event.start / 100;
      current.playhead(event.start);
    }
    draw();
  }

  function zoom(factor, centre = (state.from + state.to) / 2) {
    const span = Math.min(Math.max((state.to - state.from) * factor, 50), state.video.duration);
    const share = (centre - state.from) / (state.to - state.from);
    pan(centre - share * span - state.from, span);
  }
  function pan(by, span = state.to - state.from) {
    const from = Math.min(Math.max(state.from + by, 0), state.video.duration - span);
    Object.assign(state, { from, to: from + span });
    draw();
  }
  function step(by) {
    const events = current.drawn;
    if (!events.length) return;
    const at = events.indexOf(state.chosen);
    choose(events[at < 0 ? (by > 0 ? 0 : events.length - 1) : (at + by + events.length) % events.length]);
  }
  function neighbour(by) {
    const buttons = [...list.querySelectorAll("button")], at = buttons.findIndex((button) => button.dataset.id === state.video.id);
    const next = buttons[Math.min(Math.max(at + by, 0), buttons.length - 1)];
    if (!next) return;
    open(DATA.videos.find((video) => video.id === next.dataset.id));
    next.scrollIntoView({ block: "nearest" });
  }
  const keys = {
    ArrowRight: (key) => (key.shiftKey ? pan((state.to - state.from) / 5) : step(1)), ArrowLeft: (key) => (key.shiftKey ? pan((state.from - state.to) / 5) : step(-1)),
    "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5), "0": () => zoom(Infinity), n: () => neighbour(1), p: () => neighbour(-1),
    " ": () => { if (element) { if (element.paused) element.play(); else element.pause(); } }, Escape: () => { state.chosen = null; draw(); },
  };

  /* A click beside the events moves the player; dragging zooms to what was dragged over; a double click shows all. */
  function listen(drawing) {
    let began = null;
    const pixel = (mouse) => mouse.clientX - drawing.getBoundingClientRect().left;
    drawing.addEventListener("keydown", (key) => {
      if (!keys[key.key] || key.ctrlKey || key.metaKey || key.altKey) return;
      key.preventDefault();
      keys[key.key](key);
    });
    drawing.addEventListener("pointerdown", (mouse) => { began = mouse.pointerType === "mouse" && mouse.button === 0 ? pixel(mouse) : null; });
    drawing.addEventListener("pointerup", (mouse) => {
      if (began === null || Math.abs(pixel(mouse) - began) < 12) return;
      const [from, to] = [began, pixel(mouse)].map((at) => Math.min(Math.max(current.time(at), 0), state.video.duration)).sort((a, b) => a - b);
      began = null;
      if (to - from < 20) return;
      Object.assign(state, { from, to });
      draw();
    });
    drawing.addEventListener("click", (mouse) => {
      if (element && pixel(mouse) > current.left) { element.currentTime = Math.max(0, current.time(pixel(mouse)) / 100); current.playhead(100 * element.currentTime); }
    });
    drawing.addEventListener("dblclick", () => zoom(Infinity));
  }

  const changed = () => { state.chosen = null; drawList(); draw(); };
  const slider = h("input", { type: "range", id: "minscore", min: 0, max: 1, step: 0.01, value: state.score, oninput: () => { state.score = Number(slider.value); reading.textContent = state.score.toFixed(2); changed(); } });
  const reading = h("output", { for: "minscore" }, state.score.toFixed(2));
  const select = h("select", { id: "classfilter", onchange: () => { state.label = select.value === "" ? null : Number(select.value); changed(); } },
    h("option", { value: "" }, "all classes"), DATA.classes.map((name, i) => h("option", { value: i }, name)));
  const search = h("input", { type: "search", id: "videosearch", placeholder: "find a video", "aria-label": "Find a video", style: "width: 100%", oninput: () => { state.text = search.value.toLowerCase(); drawList(); } });
  const sort = h("select", { "aria-label": "Order", style: "width: 100%; margin-top: 6px", onchange: () => { state.sort = sort.value; drawList(); } }, h("option", { value: "errors" }, "most errors first"), h("option", { value: "file" }, "order of the file"));
  const chips = h("fieldset", { class: "chips", style: "border: 0; padding: 0; margin: 0" }, DATA.kinds.map((kind) => {
    const box = h("input", { type: "checkbox", checked: true, "data-kind": kind, onchange: () => { if (box.checked) state.kinds.add(kind); else state.kinds.delete(kind); changed(); } });
    return h("label", {}, box, swatch(kind), kind);
  }));
  const only = h("button", { class: "plain", id: "onlyerrors", onclick: () => {
    const all = !state.kinds.has("right");
    chips.querySelectorAll("input").forEach((box) => { box.checked = all || box.dataset.kind !== "right"; if (box.checked) state.kinds.add(box.dataset.kind); else state.kinds.delete(box.dataset.kind); });
    changed();
  } }, "errors only / all");
  const button = (text, label, action) => h("button", { class: "plain", "aria-label": label, title: label, onclick: action }, text);
  const gatesShown = DATA.videos.some((video) => video.gates.some(Boolean));
  show("browser",
    DATA.videos.length < DATA.total ? h("p", { class: "soft" }, `${DATA.videos.length} of ${DATA.total} videos are in this file; the numbers above are of all.`) : null,
    h("div", { class: "tools screen" }, h("label", {}, "class ", select), h("label", {}, "score from ", slider, reading), only),
    h("div", { class: "tools screen" }, chips),
    h("div", { class: "browser" },
      h("div", { class: "screen" }, search, sort, h("p", { class: "soft", id: "listed", style: "margin: 6px 0 0" }), list),
      h("div", {}, heading,
        h("div", { class: "tools screen" }, button("+", "Zoom in", () => zoom(1 / 1.5)), button("−", "Zoom out", () => zoom(1.5)), button("all", "Show the whole video", () => zoom(Infinity)), button("◀", "Earlier", () => pan((state.from - state.to) / 3)), button("▶", "Later", () => pan((state.to - state.from) / 3)),
          button("previous video", "Previous video", () => neighbour(-1)), button("next video", "Next video", () => neighbour(1))),
        place, h("p", { class: "soft" }, "Grey: annotated; dashed: missed; the sign on a prediction is its kind. ", gatesShown ? ["Gates of the finest level: ", h("span", { style: "color: var(--audio)" }, "- - from the audio, lets the visual stream through"), "; ", h("span", { style: "color: var(--visual)" }, "— from the video, lets the audio stream through"), TWO ? "; B thinner." : "."] : null),
        detail, player,
        h("p", { class: "soft screen" }, "Keys on the timeline: ", h("kbd", {}, "←"), " ", h("kbd", {}, "→"), " event, with ", h("kbd", {}, "Shift"), " move, ", h("kbd", {}, "+"), " ", h("kbd", {}, "−"), " ", h("kbd", {}, "0"), " zoom, ", h("kbd", {}, "n"), " ", h("kbd", {}, "p"), " video, ", h("kbd", {}, "space"), " play. Drag to zoom, double click to see all."))));
  if (!state.video) { show("browser", h("p", {}, "This file has no videos.")); return; }
  drawList();
  const wanted = decodeURIComponent(location.hash.startsWith("#video=") ? location.hash.slice(7) : "");
  const first = DATA.videos.find((video) => video.id === wanted) || DATA.videos.find((video) => video.id === list.querySelector("button")?.dataset.id) || state.video;
  open(first);
  let width = place.clientWidth;
  new ResizeObserver(() => requestAnimationFrame(() => { if (place.clientWidth !== width) { width = place.clientWidth; draw(); } })).observe(place);
}

showHead();
showEvaluation();
showCosts();
showTraits();
showClasses();
showCalibration();
showVideos();
