// One page over a folder of embeddings. Rows are numbers that the server gave; names are only shown.
//
// A view is a query with its results. The address holds the query, so that it can be bookmarked, and each entry of the
// browser's history has a view, so that the way back shows what was there. A dropped image is in no address.
"use strict";

const byId = (id) => document.getElementById(id);
const PAGE = 60;
const NOTHING = { text: "", without: "", row: null, image: null };
const views = new Map();
const state = { view: null, number: 0, last: 0, shown: -1, images: null };
history.scrollRestoration = "manual"; // the results come later than the browser would scroll

// -- the server ---------------------------------------------------------------------------------------------------

async function ask(path, parameters, image) {
  const options = image ? { method: "POST", body: image } : {};
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`, options).catch(() => {
    throw new Error("The server does not answer. Is miniclip serve still running?");
  });
  const data = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw new Error(data.error);
  return data;
}

function say(element, text, isError = false) {
  element.textContent = text.charAt(0).toUpperCase() + text.slice(1);
  element.classList.toggle("error", isError);
}

// -- views and addresses ------------------------------------------------------------------------------------------

function parametersOf({ text, without, row }) {
  const parameters = [];
  if (text) parameters.push(["text", text]);
  if (without) parameters.push(["not", without]);
  if (row) parameters.push(["row", row.row], ["generation", row.generation]);
  return parameters;
}

function addressOf(query) {
  const parameters = parametersOf(query);
  const labels = byId("labels").value.trim();
  if (labels) parameters.push(["labels", labels]);
  const search = new URLSearchParams(parameters).toString();
  return `${location.pathname}${search && "?"}${search}${current() === "classify" ? "#classify" : ""}`;
}

function queryOf(parameters) {
  const row = { row: parameters.get("row"), generation: parameters.get("generation") };
  return {
    text: parameters.get("text") ?? "",
    without: parameters.get("not") ?? "",
    row: row.row && row.generation ? row : null,
    image: null,
  };
}

// Show a query that the user has just made. With replace, the way back does not lead to what is shown now.
function go(query, replace = false) {
  if (state.view) state.view.scroll = scrollY;
  const number = ++state.last;
  views.set(number, { query, results: [], received: 0, done: false, loading: false, scroll: 0, renewed: false });
  history[replace ? "replaceState" : "pushState"]({ number }, "", addressOf(query));
  show(number);
}

function show(number) {
  const view = views.get(number);
  Object.assign(state, { view, number, shown: -1 });
  const { text, without, row, image } = view.query;
  byId("text").value = text;
  byId("without").value = without;
  byId("like").hidden = !row && !image;
  if (image) showLike(URL.createObjectURL(image), image.name || "The pasted image");
  if (row) showLike(`thumbnail/${row.generation}/${row.row}`, `More like ${row.path ?? "this one"}`);
  document.title = text ? `${text} – miniclip` : "miniclip";
  byId("grid").replaceChildren();
  view.results.forEach(addResult);
  if (!text && !row && !image) {
    view.done = true;
    say(byId("status"), without ? "Type what to look for as well." : "");
  } else if (view.results.length) {
    sayHowMany(view);
  } else {
    view.done = false;
    loadMore();
  }
  byId("intro").hidden = Boolean(text || row || image || without);
  scrollTo(0, view.scroll);
}

function showLike(address, text) {
  byId("like-image").src = address;
  byId("like-text").textContent = text;
}

// What the form says, together with the image or the row that the view starts from.
function typed() {
  return { ...state.view.query, text: byId("text").value.trim(), without: byId("without").value.trim() };
}

const useImage = (image) => go({ ...typed(), image, row: null });
const useRow = (result, replace = false) => go({ ...NOTHING, row: result }, replace);

// -- results ------------------------------------------------------------------------------------------------------

async function loadMore() {
  const { view } = state;
  if (view.done || view.loading) return;
  view.loading = true;
  say(byId("status"), "Searching …");
  try {
    const parameters = [...parametersOf(view.query), ["offset", view.received], ["count", PAGE]];
    const { generation, results } = await ask("api/search", parameters, view.query.image);
    view.received += results.length;
    view.done = results.length < PAGE;
    const known = new Set(view.results.map(({ path }) => path)); // the folder may have changed between two answers
    for (const result of results.filter(({ path }) => !known.has(path))) {
      view.results.push({ ...result, generation });
      if (view === state.view) addResult(view.results.at(-1), view.results.length - 1);
    }
    if (view === state.view) sayHowMany(view);
  } catch (error) {
    view.done = true;
    if (view === state.view) say(byId("status"), error.message, true);
  } finally {
    view.loading = false;
  }
  if (view === state.view && !view.done && byId("end").getBoundingClientRect().top < 2 * innerHeight) loadMore();
}

function sayHowMany({ results, done }) {
  if (!results.length) say(byId("status"), "There is nothing to show: the files of all images are gone.");
  else if (done) say(byId("status"), `${results.length.toLocaleString("en")} images, the best first`);
  else say(byId("status"), `The best of ${(state.images ?? results.length).toLocaleString("en")} images first`);
}

function addResult(result, number) {
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
  image.addEventListener("error", async () => {
    const reason = await reasonOf(image.src);
    if (reason && image.isConnected) frame.textContent = reason;
  });
  image.src = `thumbnail/${result.generation}/${result.row}`;
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

// Why an image cannot be shown. If its number has passed, the same query is asked again.
async function reasonOf(address) {
  const { view } = state;
  const status = await fetch(address).then((answer) => answer.status, () => 0);
  if (status === 0) return "The server does not answer.";
  if (status !== 410) return "The image is gone, or it cannot be read.";
  if (view !== state.view || view.renewed) return "";
  Object.assign(view, { results: [], received: 0, scroll: 0, renewed: true });
  setTimeout(() => { view.renewed = false; }, 2000); // images of the old answer may still fail
  if (byId("large").open) byId("large").close();
  show(state.number);
  return "";
}

// -- the large view -----------------------------------------------------------------------------------------------

// It has an entry in the history, so that the way back closes it.
function openLarge(number) {
  const { results } = state.view;
  if (number < 0 || number >= results.length) return;
  const result = results[number];
  state.shown = number;
  byId("large-image").hidden = false;
  byId("large-gone").hidden = true;
  byId("large-image").alt = result.path;
  byId("large-image").src = `image/${result.generation}/${result.row}`;
  byId("large-path").textContent = result.path;
  byId("large-score").textContent = result.score.toFixed(3);
  byId("copy").textContent = "Copy path";
  byId("previous").disabled = number === 0;
  byId("next").disabled = number === results.length - 1;
  if (!byId("large").open) {
    if (!history.state.large) history.pushState({ number: state.number, large: true }, "");
    byId("large").showModal();
  }
  if (number > results.length - 10) loadMore().then(() => { byId("next").disabled = state.shown >= results.length - 1; });
}

byId("large-image").addEventListener("error", async () => {
  const { shown } = state;
  byId("large-image").hidden = true;
  const reason = await reasonOf(byId("large-image").src);
  if (shown !== state.shown) return;
  byId("large-gone").hidden = false;
  byId("large-gone").textContent = reason;
});
byId("large").addEventListener("close", () => {
  if (history.state.large) history.back();
  byId("grid").querySelectorAll("button")[state.shown]?.focus();
});
byId("previous").addEventListener("click", () => openLarge(state.shown - 1));
byId("next").addEventListener("click", () => openLarge(state.shown + 1));
byId("close").addEventListener("click", () => byId("large").close());
byId("more-like").addEventListener("click", () => { useRow(state.view.results[state.shown], true); byId("large").close(); });
byId("copy").addEventListener("click", async () => {
  const { path } = state.view.results[state.shown];
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
  history.replaceState(history.state, "", addressOf(state.view.query));
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
      const [name, percent, bar] = ["span", "b", "progress"].map((kind) => document.createElement(kind));
      name.textContent = label;
      percent.textContent = `${(100 * probability).toFixed(1)}%`;
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

byId("query").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = typed();
  if (JSON.stringify(query) === JSON.stringify(state.view.query) && query.image === state.view.query.image) {
    Object.assign(state.view, { results: [], received: 0, scroll: 0 }); // the same again, after an error for example
    show(state.number);
  } else go(query);
});
byId("classify-form").addEventListener("submit", (event) => { event.preventDefault(); classify(); });
byId("like-clear").addEventListener("click", () => go({ ...typed(), row: null, image: null }));
byId("file").addEventListener("change", (event) => {
  if (event.target.files[0]) useImage(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
byId("classify-file").addEventListener("change", (event) => event.target.files[0] && useClassified(event.target.files[0]));

const tabs = ["search", "classify"];
const current = () => tabs.find((name) => !byId(name).hidden);

function openTab(name) {
  for (const each of tabs) {
    byId(each).hidden = each !== name;
    byId(`tab-${each}`).setAttribute("aria-selected", each === name);
    byId(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  if (state.view) history.replaceState(history.state, "", addressOf(state.view.query));
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
    const { query } = state.view;
    if (query.image || parametersOf(query).length) go(NOTHING);
    else byId("text").value = byId("without").value = "";
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

addEventListener("popstate", (event) => {
  const { number, large } = event.state ?? {};
  if (!large && byId("large").open) byId("large").close();
  if (!views.has(number)) { // an entry of an earlier visit to this page
    state.view.scroll = scrollY;
    openAddress(location);
  } else if (number !== state.number) {
    state.view.scroll = scrollY;
    show(number);
  } else if (large) openLarge(state.shown);
});

// What an address stands for. The token is taken out of it: from now on the cookie is enough.
function openAddress({ search, hash }) {
  const parameters = new URLSearchParams(search);
  byId("labels").value = parameters.get("labels") ?? byId("labels").value;
  openTab(hash === "#classify" ? "classify" : "search");
  go(queryOf(parameters), true);
}

ask("api/index", []).then(
  ({ images, model }) => {
    state.images = images;
    say(byId("about"), `${images.toLocaleString("en")} images, ${model.split("/").pop()}`);
    byId("about").title = model;
  },
  (error) => say(byId("about"), error.message, true),
);
openAddress(location);
