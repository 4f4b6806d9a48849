// A page that is opened from the disk may not start workers, and the search is one. There, its script runs in a hidden
// frame, which sends and gets the messages of a worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = this.onmessageerror = this.onerror = null
      this.unsent = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = data => this.tell("message", { data })
      const script = inside.document.createElement("script")
      script.src = new URL(url, location.href).href
      script.onload = () => {
        const unsent = this.unsent
        this.unsent = null
        unsent.forEach(data => this.postMessage(data))
      }
      script.onerror = () => this.tell("error", {})
      inside.document.body.append(script)
    }

    postMessage(data) {
      if (this.unsent) {
        this.unsent.push(data)
        return
      }
      const inside = this.frame.contentWindow
      setTimeout(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }

    tell(kind, content) {
      const event = new MessageEvent(kind, content)
      setTimeout(() => {
        this.dispatchEvent(event)
        this[`on${kind}`]?.(event)
      })
    }
  }
}
