// One page over a folder of embeddings. Rows are numbers that the server gave; names are only shown.
"use strict";

const byId = (id) => document.getElementById(id);
const PAGE = 60;
const state = { results: [], query: null, done: true, loading: false, shown: -1, image: null, row: null, turn: 0 };

// -- the server ---------------------------------------------------------------------------------------------------

async function ask(path, parameters, image) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`, image ? { method: "POST", body: image } : {});
  const data = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw new Error(data.error);
  return data;
}

function say(element, text, isError = false) {
  element.textContent = text;
  element.classList.toggle("error", isError);
}

// -- search -------------------------------------------------------------------------------------------------------

function startSearch() {
  const text = byId("text").value.trim();
  const without = byId("without").value.trim();
  if (!text && !state.image && state.row === null) {
    say(byId("status"), "Type what to look for, or choose an image.");
    return;
  }
  const parameters = [];
  if (text) parameters.push(["text", text]);
  if (without) parameters.push(["not", without]);
  if (state.row !== null) parameters.push(["row", state.row.row], ["generation", state.row.generation]);
  Object.assign(state, { query: parameters, results: [], done: false, loading: false, turn: state.turn + 1 });
  byId("grid").replaceChildren();
  loadMore();
}

async function loadMore() {
  if (state.done || state.loading) return;
  state.loading = true;
  const turn = state.turn;
  say(byId("status"), "Searching …");
  try {
    const parameters = [...state.query, ["offset", state.results.length], ["count", PAGE]];
    const { generation, results } = await ask("api/search", parameters, state.image);
    if (turn !== state.turn) return; // another search has begun
    state.done = results.length < PAGE;
    for (const result of results) addResult({ ...result, address: `${generation}/${result.row}`, generation });
    say(byId("status"), state.results.length ? `${state.results.length}${state.done ? "" : " or more"} images` : "No images.");
  } catch (error) {
    if (turn !== state.turn) return;
    state.done = true;
    say(byId("status"), error.message, true);
  } finally {
    if (turn === state.turn) state.loading = false;
  }
  if (turn === state.turn && !state.done && byId("end").getBoundingClientRect().top < 2 * innerHeight) loadMore();
}

function addResult(result) {
  const number = state.results.push(result) - 1;
  const name = result.path.split(/[\\/]/).pop();
  const button = document.createElement("button");
  button.type = "button";
  button.title = result.path;
  button.addEventListener("click", () => openLarge(number));
  const frame = document.createElement("span");
  frame.className = "frame";
  const image = document.createElement("img");
  image.alt = name;
  image.loading = "lazy";
  image.addEventListener("error", () => { frame.textContent = "The image is gone."; });
  image.src = `thumbnail/${result.address}`;
  frame.append(image);
  const caption = document.createElement("small");
  const score = document.createElement("b");
  score.textContent = result.score.toFixed(3);
  caption.append(score, ` ${name}`);
  button.append(frame, caption);
  const item = document.createElement("li");
  item.append(button);
  byId("grid").append(item);
}

function useImage(image) {
  state.image = image;
  state.row = null;
  showLike(URL.createObjectURL(image), image.name || "the pasted image");
  startSearch();
}

function useRow(result) {
  state.row = result;
  state.image = null;
  byId("text").value = "";
  showLike(`thumbnail/${result.address}`, `More like ${result.path}`);
  startSearch();
}

function showLike(address, text) {
  byId("like-image").src = address;
  byId("like-text").textContent = text;
  byId("like").hidden = false;
}

function clearLike() {
  state.image = state.row = null;
  byId("like").hidden = true;
  byId("file").value = "";
}

// -- the large view -----------------------------------------------------------------------------------------------

function openLarge(number) {
  if (number < 0 || number >= state.results.length) return;
  const result = state.results[number];
  state.shown = number;
  byId("large-image").hidden = false;
  byId("large-gone").hidden = true;
  byId("large-image").alt = result.path;
  byId("large-image").src = `image/${result.address}`;
  byId("large-path").textContent = result.path;
  byId("large-score").textContent = result.score.toFixed(3);
  byId("copy").textContent = "Copy path";
  if (!byId("large").open) byId("large").showModal();
  if (number > state.results.length - 10) loadMore();
}

byId("large-image").addEventListener("error", () => {
  byId("large-image").hidden = true;
  byId("large-gone").hidden = false;
  byId("large-gone").textContent = "The image is gone, or it cannot be read.";
});
byId("large").addEventListener("close", () => byId("grid").querySelectorAll("button")[state.shown]?.focus());
byId("previous").addEventListener("click", () => openLarge(state.shown - 1));
byId("next").addEventListener("click", () => openLarge(state.shown + 1));
byId("close").addEventListener("click", () => byId("large").close());
byId("more-like").addEventListener("click", () => { byId("large").close(); useRow(state.results[state.shown]); });
byId("copy").addEventListener("click", async () => {
  const path = state.results[state.shown].path;
  try {
    await navigator.clipboard.writeText(path);
    byId("copy").textContent = "Copied";
  } catch { // no permission, or not a secure address: select the path, so that Ctrl-C copies it
    getSelection().selectAllChildren(byId("large-path"));
    byId("copy").textContent = "Selected: press Ctrl-C";
  }
});

// -- classify -----------------------------------------------------------------------------------------------------

let classified = null;

function useClassified(image) {
  classified = image;
  byId("classify-image").src = URL.createObjectURL(image);
  byId("classify-image").hidden = false;
  classify();
}

async function classify() {
  const labels = byId("labels").value.split(",").map((label) => label.trim()).filter(Boolean);
  byId("answers").replaceChildren();
  if (!classified || labels.length < 2) {
    say(byId("classify-status"), classified ? "Type two labels or more." : "Choose, drop or paste an image.");
    return;
  }
  say(byId("classify-status"), "Classifying …");
  try {
    const answer = await ask("api/classify", labels.map((label) => ["label", label]), classified);
    say(byId("classify-status"), "");
    for (const { label, probability } of answer.labels) {
      const item = document.createElement("li");
      const [name, percent, bar] = ["span", "b", "meter"].map((kind) => document.createElement(kind));
      name.textContent = label;
      percent.textContent = `${(100 * probability).toFixed(1)} %`;
      bar.value = probability;
      bar.setAttribute("aria-label", `${label}: ${percent.textContent}`);
      item.append(name, percent, bar);
      byId("answers").append(item);
    }
  } catch (error) {
    say(byId("classify-status"), error.message, true);
  }
}

// -- forms, tabs, dropping, keyboard ------------------------------------------------------------------------------

byId("query").addEventListener("submit", (event) => { event.preventDefault(); startSearch(); });
byId("classify-form").addEventListener("submit", (event) => { event.preventDefault(); classify(); });
byId("like-clear").addEventListener("click", () => { clearLike(); if (byId("text").value.trim()) startSearch(); });
byId("file").addEventListener("change", (event) => event.target.files[0] && useImage(event.target.files[0]));
byId("classify-file").addEventListener("change", (event) => event.target.files[0] && useClassified(event.target.files[0]));

const tabs = ["search", "classify"];
const current = () => tabs.find((name) => !byId(name).hidden);

function openTab(name) {
  for (const each of tabs) {
    byId(each).hidden = each !== name;
    byId(`tab-${each}`).setAttribute("aria-selected", each === name);
    byId(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
}

for (const name of tabs) {
  byId(`tab-${name}`).addEventListener("click", () => openTab(name));
  byId(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[1 - tabs.indexOf(name)];
    openTab(other);
    byId(`tab-${other}`).focus();
  });
}

function take(files) {
  const image = [...files].find((file) => file.type.startsWith("image/"));
  if (!image) say(byId(current() === "search" ? "status" : "classify-status"), "That is not an image.", true);
  else if (current() === "search") useImage(image);
  else useClassified(image);
}

addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => { if (event.clipboardData.files.length) take(event.clipboardData.files); });

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target instanceof HTMLInputElement;
  if (byId("large").open) {
    if (event.key === "ArrowLeft") openLarge(state.shown - 1);
    if (event.key === "ArrowRight") openLarge(state.shown + 1);
  } else if (event.key === "/" && !typing && current() === "search") {
    event.preventDefault();
    byId("text").select();
  } else if (event.key === "Escape" && current() === "search") {
    clearLike();
    byId("text").value = "";
    byId("text").focus();
  } else if (event.key.startsWith("Arrow") && event.target.closest?.("#grid")) {
    moveInGrid(event);
  }
});

function moveInGrid(event) {
  const buttons = [...byId("grid").querySelectorAll("button")];
  const columns = getComputedStyle(byId("grid")).gridTemplateColumns.split(" ").length;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  const target = buttons[buttons.indexOf(event.target.closest("button")) + steps[event.key]];
  if (target) {
    event.preventDefault();
    target.focus();
  }
}

new IntersectionObserver((seen) => seen[0].isIntersecting && loadMore(), { rootMargin: "600px" }).observe(byId("end"));

ask("api/index", []).then(
  ({ images, model }) => say(byId("about"), `${images.toLocaleString("en")} images, ${model}`),
  (error) => say(byId("about"), error.message, true),
);
